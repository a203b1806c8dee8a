import math

import pytest
import torch
from torch import Tensor

from dpar import ModelError, VQConfig, VQTokenizer
from dpar.presets import TOKENIZERS, tokenizer_preset
from dpar.tokenizer import Quantised, Quantiser, from_uint8, psnr, to_uint8
from dpar.vqgan import Discriminator, LossWeights, VQLoss, entropy_penalty, restart_unused

CONFIG = VQConfig(
    codebook_size=64,
    codebook_dim=4,
    channels=32,
    channel_multipliers=(1, 1, 2),
    residual_blocks=1,
    latent_channels=16,
)


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(CONFIG).eval()


def images(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
@torch.no_grad()
def test_images_have_one_code_per_square_of_pixels_and_decode_to_their_shape(
    tokenizer: VQTokenizer, height: int, width: int
) -> None:
    assert CONFIG.downsampling == 4
    codes = tokenizer.encode(images(2, height, width))
    assert codes.shape == (2, height // 4 * (width // 4))
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < 64
    decoded = tokenizer.decode(codes, (height // 4, width // 4))
    assert decoded.shape == (2, 3, height, width)
    assert decoded.dtype == torch.float32


@torch.no_grad()
def test_the_grid_distinguishes_wide_and_tall_images(tokenizer: VQTokenizer) -> None:
    codes = torch.arange(12).unsqueeze(0)
    assert tokenizer.decode(codes, (2, 6)).shape == (1, 3, 8, 24)
    assert tokenizer.decode(codes, (6, 2)).shape == (1, 3, 24, 8)


@torch.no_grad()
def test_a_square_grid_is_the_default(tokenizer: VQTokenizer) -> None:
    codes = tokenizer.encode(images())
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(codes, (4, 4)))


@torch.no_grad()
def test_codes_are_in_raster_order(tokenizer: VQTokenizer) -> None:
    quantiser = tokenizer.quantize
    codes = torch.randperm(64)[:6].unsqueeze(0)
    latent = quantiser.lookup(codes, 2, 3)
    torch.testing.assert_close(latent[0, :, 1, 0], quantiser.vectors()[codes[0, 3]])
    assert torch.equal(quantiser.nearest(latent * 7.5), codes)  # by direction, not by length


@torch.no_grad()
def test_training_and_encoding_choose_the_same_codes(tokenizer: VQTokenizer) -> None:
    reconstruction, quantised = tokenizer(images())
    assert torch.equal(quantised.codes, tokenizer.encode(images()))
    torch.testing.assert_close(reconstruction, tokenizer.decode(quantised.codes))


@torch.no_grad()
def test_nearest_has_the_largest_cosine_across_chunks() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(32, 4)
    latent = torch.randn(3, 4, 40, 50)  # 6000 rows: more than one chunk
    rows = latent.permute(0, 2, 3, 1).reshape(-1, 4)
    cosine = torch.nn.functional.cosine_similarity(rows.unsqueeze(1), quantiser.embedding.weight, dim=-1)
    chosen = cosine.gather(1, quantiser.nearest(latent).flatten().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, cosine.max(dim=1).values)


def test_the_reconstruction_reaches_the_encoder_straight_through_the_quantiser() -> None:
    torch.manual_seed(0)
    model = VQTokenizer(CONFIG)
    reconstruction, _ = model(images())
    reconstruction.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name == "quantize.embedding.weight":
            assert parameter.grad is None  # the codebook learns from its own loss alone
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_codebook_loss_moves_the_codebook_and_commitment_the_encoder() -> None:
    quantiser = Quantiser(8, 4)
    latent = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantised = quantiser(latent)
    torch.testing.assert_close(quantised.codebook_loss, quantised.commitment_loss)
    learned = {"latent": latent, "codebook": quantiser.embedding.weight}

    def moved_by(loss: Tensor) -> list[str]:
        gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True, retain_graph=True)
        return [name for name, g in zip(learned, gradients, strict=True) if g is not None and bool(g.any())]

    assert moved_by(quantised.codebook_loss) == ["codebook"]
    assert moved_by(quantised.commitment_loss) == ["latent"]


def test_pixels_are_scaled_clamped_and_cut_to_integers() -> None:
    values = [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
    pixels = to_uint8(torch.tensor(values).view(1, 1, 1, 7).expand(2, 3, 1, 7))
    assert pixels.shape == (2, 1, 7, 3)
    assert pixels.dtype == torch.uint8
    assert pixels[0, 0, :, 0].tolist() == [int(min(max(127.5 * x + 128, 0), 255)) for x in values]


def test_all_pixel_values_survive_a_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    floats = from_uint8(pixels)
    assert floats.shape == (1, 3, 16, 16)
    torch.testing.assert_close(floats[0, 0].flatten(), torch.arange(256) / 127.5 - 1)
    assert torch.equal(to_uint8(floats), pixels)


def test_psnr_is_that_of_each_image() -> None:
    reference = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    pixels = reference.clone()
    pixels[1] += 10
    pixels[2, 0, 0, 0] = 255
    found = psnr(pixels, reference).tolist()
    assert found[0] > 100
    assert found[1] == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
    assert found[2] == pytest.approx(10 * math.log10(48), abs=1e-4)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 18, 16), (1, 3, 16, 15)])
def test_images_that_do_not_divide_into_codes_are_refused(tokenizer: VQTokenizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"images are \(.*sides that divide by 4"):
        tokenizer.encode(torch.zeros(shape))


def test_codes_that_do_not_fill_the_grid_are_refused(tokenizer: VQTokenizer) -> None:
    with pytest.raises(ModelError, match="12 codes do not fill a grid of 3×3"):
        tokenizer.decode(torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(ModelError, match="12 codes do not fill a grid of 2×5"):
        tokenizer.decode(torch.zeros(1, 12, dtype=torch.long), (2, 5))


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("codebook_size", 0, "codebook_size is 0"),
        ("codebook_dim", -1, "codebook_dim is -1"),
        ("channels", 48, "channels is 48; group norms need a multiple of 32"),
        ("channel_multipliers", (), r"channel_multipliers is \(\)"),
        ("channel_multipliers", (1, 0), r"channel_multipliers is \(1, 0\)"),
    ],
)
def test_invalid_sizes_of_a_tokenizer_are_refused(name: str, value: object, fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        tokenizer_preset("vq-16", **{name: value})


def test_tokenizer_presets_have_llamagens_sizes() -> None:
    def parameters(name: str) -> float:
        with torch.device("meta"):
            return sum(p.numel() for p in VQTokenizer(tokenizer_preset(name)).parameters()) / 1e6

    assert parameters("vq-16") == pytest.approx(71.9, abs=0.05)
    assert parameters("vq-8") == pytest.approx(70.3, abs=0.5)
    assert [TOKENIZERS[name].downsampling for name in ("vq-16", "vq-8", "vq-8-tiny")] == [16, 8, 8]


def test_an_unknown_tokenizer_preset_suggests_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"no preset is called 'vq16'. Did you mean vq-16"):
        tokenizer_preset("vq16")


# Losses and the codebook's upkeep


def test_restarting_moves_dead_codes_onto_the_latents_and_no_others() -> None:
    quantiser = Quantiser(16, 4)
    before = quantiser.embedding.weight.detach().clone()
    used = torch.ones(16, dtype=torch.long)
    used[[2, 5, 11]] = 0
    latent = torch.randn(2, 4, 3, 3)
    assert restart_unused(quantiser, used, latent, torch.Generator().manual_seed(0)) == 3
    after = quantiser.embedding.weight.detach()
    assert torch.equal(after[used > 0], before[used > 0])
    rows = torch.nn.functional.normalize(latent, dim=1).permute(0, 2, 3, 1).reshape(-1, 4)
    distances = torch.cdist(after[used == 0], rows)
    assert distances.min(dim=1).values.max() < 1e-6
    assert not torch.equal(after[used == 0], before[used == 0])


def test_restarting_a_codebook_in_full_use_changes_nothing() -> None:
    quantiser = Quantiser(4, 4)
    before = quantiser.embedding.weight.detach().clone()
    moved = restart_unused(quantiser, torch.ones(4), torch.randn(1, 4, 2, 2), torch.Generator())
    assert moved == 0
    assert torch.equal(quantiser.embedding.weight, before)


def test_restarting_is_determined_by_its_generator() -> None:
    first, second = Quantiser(16, 4), Quantiser(16, 4)
    latent = torch.randn(2, 4, 3, 3)
    for quantiser in (first, second):
        restart_unused(quantiser, torch.zeros(16), latent, torch.Generator().manual_seed(3))
    assert torch.equal(first.embedding.weight, second.embedding.weight)


def loss_parts(loss: VQLoss, adversarial: bool = True) -> tuple[Tensor, dict[str, Tensor], VQTokenizer]:
    torch.manual_seed(0)
    model = VQTokenizer(CONFIG)
    reconstruction, quantised = model(images(2, 32, 32))
    total, parts = loss(images(2, 32, 32), reconstruction, quantised, adversarial)
    return total, parts, model


def test_the_loss_is_the_weighted_sum_of_finite_parts() -> None:
    weights = LossWeights(reconstruction=2.0, codebook=0.5, commitment=0.1, entropy=0.3, adversarial=0.7)
    total, parts, model = loss_parts(VQLoss(weights))
    assert set(parts) == {"reconstruction", "codebook", "commitment", "entropy", "adversarial"}
    assert all(math.isfinite(part.item()) for part in parts.values())
    assert total.item() == pytest.approx(sum(getattr(weights, k) * v.item() for k, v in parts.items()), rel=1e-5)
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_losses_of_weight_zero_are_not_computed() -> None:
    assert set(loss_parts(VQLoss(LossWeights()))[1]) == {"reconstruction", "codebook", "commitment"}


def test_the_adversarial_loss_is_zero_before_its_start() -> None:
    assert "adversarial" not in loss_parts(VQLoss(LossWeights(adversarial=1.0)), adversarial=False)[1]


def test_the_entropy_penalty_is_least_for_confident_and_uniform_use() -> None:
    sharp_and_even = entropy_penalty(torch.eye(8))
    assert sharp_and_even.item() == pytest.approx(-math.log(8), abs=1e-3)
    collapsed = torch.zeros(8, 8)
    collapsed[:, 0] = 1
    assert entropy_penalty(collapsed).item() == pytest.approx(0, abs=1e-3)
    assert entropy_penalty(torch.zeros(8, 8)).item() == pytest.approx(0, abs=1e-3)


def test_the_entropy_penalty_has_finite_gradients_for_unused_codes() -> None:
    similarity = torch.full((6, 8), -1.0)
    similarity[:, 0] = 1.0
    similarity[:3, 1] = 0.999
    similarity.requires_grad_()
    entropy_penalty(similarity).backward()
    assert similarity.grad is not None
    assert similarity.grad.isfinite().all()
    assert similarity.grad.abs().max() > 0


def test_the_discriminators_loss_is_the_hinge_and_trains_only_the_discriminator() -> None:
    torch.manual_seed(0)
    loss = VQLoss(LossWeights(adversarial=1.0))
    assert loss.discriminator is not None
    real, fake = images(2, 32, 32), (images(2, 32, 32) * 0.5).requires_grad_()
    loss.discriminator.eval()  # so that batch norms are deterministic
    value = loss.discriminator_loss(real, fake)
    margins = [1 - loss.discriminator(real), 1 + loss.discriminator(fake)]
    assert value.item() == pytest.approx(sum(m.clamp(min=0).mean().item() for m in margins) / 2, rel=1e-5)
    value.backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in loss.discriminator.parameters())


def test_a_few_steps_train_the_discriminator_to_distinguish_images() -> None:
    torch.manual_seed(0)
    loss = VQLoss(LossWeights(adversarial=1.0))
    loss.discriminator = Discriminator(channels=8, layers=2)
    optimiser = torch.optim.Adam(loss.discriminator.parameters(), lr=1e-2)
    real, fake = images(4, 32, 32), torch.zeros(4, 3, 32, 32)
    values = []
    for _ in range(20):
        optimiser.zero_grad()
        value = loss.discriminator_loss(real, fake)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[0] > 0.5
    assert values[-1] < 0.1


def test_without_a_discriminator_its_loss_is_refused() -> None:
    with pytest.raises(ModelError, match="there is no discriminator"):
        VQLoss(LossWeights()).discriminator_loss(images(), images())


def test_quantised_similarities_are_cosines() -> None:
    quantised: Quantised = Quantiser(8, 4)(torch.randn(2, 4, 3, 3))
    assert quantised.similarity.shape == (18, 8)
    assert quantised.similarity.abs().max() <= 1 + 1e-6
    assert torch.equal(quantised.similarity.argmax(dim=1).view(2, 9), quantised.codes)


def test_the_nearest_code_is_looked_up_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(codebook_size=1024, codebook_dim=8)
    latent = torch.randn(4, 8, 16, 16)
    exact = quantiser.nearest(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantiser.nearest(latent), exact)
        assert torch.equal(quantiser(latent).codes, exact)
