"""The web page of ``dpar app``: sample from a bundle or a run, patchify and edit in the browser.

    serve       loads the model, starts the server, waits
    model       the pipeline with its name and its costs
    compute     the share of compute that patches save
    drawing     the actions of the tabs, without Gradio: sampling, editing, patches of an image
    pictures    sampled pictures with their patches, entropies and settings, and their PNG files
    examples    example images
    jobs        runs one job at a time; a browser session can stop its job
    page        the page and its tabs
    controls    sliders that tabs share
    results     sampled pictures on the page

Only ``page``, ``controls`` and ``results`` import Gradio.
"""
