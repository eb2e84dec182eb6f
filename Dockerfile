# Built in one stage, run from the other: the image holds the binary and nothing else.
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY *.go *.lua ./
COPY static static
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags="-s -w -X main.release=${VERSION}" -o /cometes .

FROM scratch
COPY --from=build /cometes /cometes
USER 65532:65532
ENV PORT=8080
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=2s CMD ["/cometes", "-healthcheck"]
ENTRYPOINT ["/cometes"]
