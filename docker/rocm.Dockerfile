# qlora-hal on AMD GPUs. From the root of a checkout, on a host with the amdgpu driver:
#
#     docker build --file docker/rocm.Dockerfile --tag qlora-hal:rocm .
#     docker run --rm --device /dev/kfd --device /dev/dri --group-add video --group-add "$(getent group render | cut -d: -f3)" \
#         --volume "$PWD:/work" --user "$(id -u):$(id -g)" qlora-hal:rocm doctor
#
# Never built or run so far. --build-arg EXTRAS=rocm,data adds what Parquet files and the hub's data sets need.
# bitsandbytes loads ROCm's math libraries from the system: the base holds them, and with them most of the image's size.
FROM rocm/dev-ubuntu-24.04:7.2.4-complete
ARG EXTRAS=rocm
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/qlora-hal
ENV PATH=/opt/qlora-hal/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The index for ROCm has torch in a few versions, each with a Triton of its own: its newest is taken.
# hadolint ignore=DL3013
RUN pip install --index-url https://download.pytorch.org/whl/rocm7.2 torch
COPY . /src
RUN grep --invert-match --extended-regexp '^(torch|triton)==' /src/constraints.txt > /tmp/constraints.txt \
    && pip install --constraint /tmp/constraints.txt "/src[${EXTRAS}]" \
    && rm -r /src /tmp/constraints.txt
# Ubuntu's images have a user 1000 of their own.
RUN useradd --create-home --uid 1001 qlora && install --directory --owner qlora /work
ENV HOME=/tmp PYTHONUNBUFFERED=1
USER 1001
WORKDIR /work
ENTRYPOINT ["qlora-hal"]
CMD ["doctor"]
