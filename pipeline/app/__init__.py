"""The page of ``dpar app``: a bundle or a run in the browser, to sample, patchify and edit with.

    serve       loads the model, starts the server, waits
    model       the pipeline with its name and its costs
    compute     the share of compute that patches save
    drawing     what the tabs do, without Gradio: sampling, editing, patches of an image
    pictures    sampled pictures with their patches, entropies and settings; PNG files that carry them
    examples    images to pick
    jobs        one job at a time, each of which its session can stop
    page        the page and its tabs
    controls    sliders that tabs share
    results     sampled pictures on the page

Only ``page``, ``controls`` and ``results`` know Gradio.
"""
