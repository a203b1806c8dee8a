"""Examples at the end of each command's help, two each."""

EXAMPLES = {
    "dpar": ("dpar demo", "dpar tokenize photos codes --tokenizer vq --image-size 128"),
    "tokenize": (
        "dpar tokenize photos codes --tokenizer vq --holdout 0.05",
        "torchrun --nproc-per-node 8 -m dpar tokenize imagenet codes --tokenizer vq",
    ),
    "entropy": (
        "dpar entropy codes entropy --model llamagen-tiny --steps 1000 --batch 32",
        "dpar entropy codes entropy --from-llamagen c2i_B_256.pt",
    ),
    "patchify": (
        "dpar patchify codes patches --entropy-model entropy --target-length 1.81",
        "dpar patchify patches longer --target-length 2.5 --max-length 8",
    ),
    "train": (
        "dpar train patches run --model dpar-tiny --steps 2000 --batch 32",
        "dpar train s3://bucket/patches run --cache /nvme/dpar",
    ),
    "eval": (
        "dpar eval run scores --reference patches-holdout --samples 1000",
        "dpar eval run scores --reference patches-holdout --cfg-scale 1.5 --cfg-scale 2",
    ),
    "train-tokenizer": (
        "dpar train-tokenizer photos vq --image-size 128 --steps 2000",
        "dpar train-tokenizer photos vq --model vq-16 --image-size 256 --steps 50000",
    ),
    "sample": (
        "dpar sample run pictures --cfg-scale 2 --per-class 8 --show-patches",
        "dpar sample run below --image cup.png --keep-rows 8 --classes coffee",
    ),
    "app": ("dpar app", "dpar app run --port 8080"),
    "probe": (
        "dpar probe run probed --train patches --test patches-holdout",
        "dpar probe run probed --train patches --test patches-holdout --layer 4",
    ),
    "inspect": (
        "dpar inspect patches --out look --images 16",
        "dpar inspect patches --images 0 --verify",
    ),
    "convert": (
        "dpar convert c2i_B_256.pt c2i-b",
        "dpar convert run c2i-b --push-to you/c2i-b",
    ),
    "export": (
        "dpar export run bundle",
        "dpar export run bundle --push-to you/dpar-photos",
    ),
    "flops": (
        "dpar flops --model dpar-b --model llamagen-b --image-size 256",
        "dpar flops --entropy-model llamagen-xs --markdown",
    ),
    "demo": ("dpar demo", "dpar demo look --tiny"),
}
