// Package pin holds the requirements of go.mod until the code that needs them lands.
package pin

import (
	_ "github.com/containerd/console"
	_ "github.com/containerd/errdefs"
	_ "github.com/containerd/go-runc"
	_ "github.com/containerd/platforms"
	_ "github.com/distribution/reference"
	_ "github.com/dustin/go-humanize"
	_ "github.com/klauspost/compress/gzip"
	_ "github.com/klauspost/compress/zstd"
	_ "github.com/opencontainers/go-digest"
	_ "github.com/opencontainers/image-spec/specs-go/v1"
	_ "github.com/opencontainers/runtime-spec/specs-go"
	_ "github.com/pelletier/go-toml/v2"
	_ "github.com/spf13/cobra"
	_ "github.com/spf13/pflag"
	_ "golang.org/x/sync/errgroup"
	_ "golang.org/x/sys/unix"
	_ "oras.land/oras-go/v2/registry/remote/auth"
	_ "oras.land/oras-go/v2/registry/remote/credentials"
	_ "oras.land/oras-go/v2/registry/remote/retry"
)
