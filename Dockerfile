# photon-data and photon in a container, from the versions of constraints.txt. It runs as a user, not as root.
#
#   docker build -t photon-ct .                                            # CPU
#   docker build -t photon-ct:cuda --build-arg TORCH=cu130 .               # torch for CUDA 13.0 (names: download.pytorch.org/whl)
#   docker build -t photon-ct:data --build-arg EXTRAS=dicom,parquet .      # the data side alone, without torch
#   docker run --rm -v /data:/data --user "$(id -u)" photon-ct photon-data prepare /data/raw /data/prepared
#
# /opt/photon/installed.json lists every package with its version, the address of its wheel and the SHA-256 of the wheel.
# It is built where there is a compiler, for the compiled interpolation, and runs in an image without one.
ARG PYTHON=3.11
FROM python:${PYTHON}-bookworm AS built
ARG TORCH=cpu
ARG EXTRAS=dicom,parquet,train,lora,eval
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/photon/source
COPY . .
RUN python -m venv /opt/photon/venv
RUN /opt/photon/venv/bin/pip install --constraint constraints.txt --report /opt/photon/installed.json \
    --extra-index-url "https://download.pytorch.org/whl/${TORCH}" ".[${EXTRAS}]"

FROM python:${PYTHON}-slim-bookworm
COPY --from=built /opt/photon /opt/photon
RUN useradd --create-home photon
USER photon
WORKDIR /home/photon
ENV PATH=/opt/photon/venv/bin:$PATH HOME=/tmp
CMD ["photon-data", "--help"]
