# qlora-hal on a CPU. From the root of a checkout:
#
#     docker build --file docker/cpu.Dockerfile --tag qlora-hal:cpu .
#     docker run --rm --volume "$PWD:/work" --user "$(id -u):$(id -g)" qlora-hal:cpu train --demo
#
# Built and run with buildah on a Debian base with Python 3.11 in the place of the one below, and not yet with Docker:
# .github/workflows/images.yml does that.
# --build-arg EXTRAS=cpu,data adds what Parquet files and the hub's data sets need.
FROM python:3.12-slim-bookworm AS build
ARG EXTRAS=cpu
RUN python -m venv /opt/qlora-hal
ENV PATH=/opt/qlora-hal/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# The libraries before the sources: a change of the sources does not install torch anew.
COPY constraints.txt .
RUN pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY . .
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM python:3.12-slim-bookworm
RUN useradd --create-home --uid 1000 qlora && install --directory --owner qlora /work
COPY --from=build /opt/qlora-hal /opt/qlora-hal
# A home that any --user can write to: caches of models and of compiled kernels go there.
ENV PATH=/opt/qlora-hal/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["qlora-hal"]
CMD ["doctor"]
