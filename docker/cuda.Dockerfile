# qlora-hal on NVIDIA GPUs. From the root of a checkout, on a host with the NVIDIA driver and its container toolkit:
#
#     docker build --file docker/cuda.Dockerfile --tag qlora-hal:cuda .
#     docker run --rm --gpus all --volume "$PWD:/work" --user "$(id -u):$(id -g)" qlora-hal:cuda doctor
#
# Built with buildah on a Debian base with Python 3.11 in the place of the one below; `doctor` ran in it, without a GPU. Not run
# on NVIDIA hardware, nor built with Docker. --build-arg EXTRAS=cuda,data adds what Parquet files and the hub's data sets need.
FROM python:3.12-slim-bookworm AS build
ARG EXTRAS=cuda
RUN python -m venv /opt/qlora-hal
ENV PATH=/opt/qlora-hal/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# The libraries before the sources: a change of the sources does not install torch anew. Its wheel brings CUDA itself.
COPY constraints.txt .
RUN pip install --constraint constraints.txt torch
COPY . .
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM python:3.12-slim-bookworm
# Triton compiles the start of each kernel with the system's C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 qlora && install --directory --owner qlora /work
COPY --from=build /opt/qlora-hal /opt/qlora-hal
# A home that any --user can write to: caches of models and of compiled kernels go there. The container toolkit reads the
# two names of NVIDIA.
ENV PATH=/opt/qlora-hal/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /work
ENTRYPOINT ["qlora-hal"]
CMD ["doctor"]
