"""Settings of every stage: one frozen dataclass each, validated on creation, with all defaults.

    fields      types, help headings, checks, and which fields determine a result
    artifacts   tokenize, patchify, inspect
    training    train-tokenizer, entropy, train
    sampling    sample, eval
    models      probe, flops, convert
    app         the page in the browser
    options     command-line options for all of these, --config, and help
    examples    the examples in each command's help

The command line derives its options from these fields, ``--config FILE.toml`` uses their names, and manifests and
runs record them. The strings next to each type are its help text and its heading in ``--help``.
"""
