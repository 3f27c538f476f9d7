# syntax=docker/dockerfile:1

# An image with nothing in it but the program, linked statically, and the authorities that it trusts. From the repository's root:
#   docker build -f deploy/docker/static.Dockerfile -t phalanx:static .
# No shell and no packages, so none to keep up to date. Whoever runs it asks /livez and /readyz from outside;
# the files beside this one, and the chart, which run phalanx-health or sleep inside, want the other image.

# 1.95 or later.
ARG RUST_VERSION=1

FROM rust:${RUST_VERSION}-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends musl-tools \
    && rm -rf /var/lib/apt/lists/* \
    && rustup target add "$(uname -m)-unknown-linux-musl"
WORKDIR /src
COPY . .
# shard and cluster are other names of the one program.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --package phalanx-coordinator --bin coordinator --target "$(uname -m)-unknown-linux-musl" \
    && install -D --strip "target/$(uname -m)-unknown-linux-musl/release/coordinator" /out/usr/local/bin/coordinator \
    && ln -s coordinator /out/usr/local/bin/shard \
    && ln -s coordinator /out/usr/local/bin/cluster \
    && install -D --mode=0644 /etc/ssl/certs/ca-certificates.crt /out/etc/ssl/certs/ca-certificates.crt \
    && install -d -m 0750 /folders/lib/phalanx /folders/cache/phalanx

FROM scratch
LABEL org.opencontainers.image.title="Phalanx" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/ /
COPY --from=build --chown=10001:10001 /folders/ /var/

# As in the other image: models and the embedded store, which volumes keep; a number for a user; the same ports.
ENV PATH=/usr/local/bin \
    PHALANX_CACHE=/var/cache/phalanx \
    XDG_STATE_HOME=/var/lib
USER 10001:10001
WORKDIR /var/lib/phalanx
EXPOSE 8000 50051 50100 50101 50102
CMD ["coordinator", "--host", "0.0.0.0", "--grpc-host", "127.0.0.1"]
