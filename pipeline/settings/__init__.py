"""Every stage's settings: one frozen dataclass each, checked once, and the one place where a default stands.

    fields      types, help headings, checks, and which fields decide a result
    artifacts   tokenize, patchify, inspect
    training    train-tokenizer, entropy, train
    sampling    sample, eval
    models      probe, flops, convert
    app         the page in the browser
    options     the command line's options of all these, --config, and help
    examples    the last lines of each command's help

The command line makes its options from these fields, a ``--config FILE.toml`` uses their names, and manifests and
runs record them. The strings beside each type are its help and the heading under which ``--help`` lists it.
"""
