# LoRA workbench for a machine with an NVIDIA GPU; docs/how-to/install.md says how it is built and run.
# torch's wheels bring CUDA's libraries: the image adds only what lets the container see the driver.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS build

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-pip python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml README.md LICENSE params.yaml ./
COPY lora_workbench lora_workbench
COPY cli cli
COPY tui tui
COPY pipeline pipeline
COPY docs docs
COPY data data
COPY document/data document/data
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Triton compiles a launcher for each kernel, and the kernels for the CPU are compiled too: gcc and Python's headers.
# Ubuntu removes a package's old versions, so that a pinned one could not be installed a month later.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc git libc6-dev python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 --user-group lora \
 && install --directory --owner lora --group lora /models /projects

ARG EXTRAS=gpu,qlora,gguf,llama-cpp,datasets,serve,web
COPY constraints.txt /tmp/
COPY --from=build /wheels /tmp/wheels
RUN python3 -m venv /opt/lora \
 && /opt/lora/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt "$(echo /tmp/wheels/*.whl)[$EXTRAS]" \
 && rm -r /tmp/wheels /tmp/constraints.txt

# Imported bases, downloads of the hub and compiled kernels outlive the container in /models, results in /projects.
ENV PATH=/opt/lora/bin:$PATH \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
    XDG_CACHE_HOME=/models/cache \
    HF_HOME=/models/huggingface
VOLUME ["/models", "/projects"]
WORKDIR /projects
USER 10001:10001
HEALTHCHECK NONE
ENTRYPOINT ["lora"]
CMD ["--help"]
