"""What a project is to somebody who looks: plain rows, read from its files, without torch.

The commands print these rows and the screens show them:

    stages         the state of each stage, and why
    runs           training runs: the last of each stage, and those in the cache
    looks          the colour and sign of each run
    models         models and adapters by their files, and whether those are whole
    model_library  the same for many folders, kept until a file changes
    evaluations    what was measured of each model, and the limits that it keeps or breaks
    sweeps         the adapters of a sweep
    reports        pages and pictures that stages wrote
    data_files     the files that stages read, and how rows get into them
"""
