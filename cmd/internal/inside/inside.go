// Package inside is what the commands that look into images share: how they find an image's layers.
package inside

import (
	"context"
	"io"
	"runtime/debug"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"
	"distkit/image/look"

	"archive/tar"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// Flags are --root, --namespace, --platform and --max-memory.
type Flags struct {
	maxMemory                 *uint32 // in MiB
	root, namespace, platform *string
}

// NewFlags registers the flags, and tunes the process to use little memory besides what it keeps.
func NewFlags(c *cobra.Command) *Flags {
	debug.SetGCPercent(6) // what is kept has few pointers, so collecting it costs little
	set := c.Flags()
	f := &Flags{
		root: cli.Root(set), namespace: cli.Namespace(set),
		platform:  set.String("platform", "", "the `PLATFORM` of an index: os/arch[/variant] (default: this machine's)"),
		maxMemory: set.Uint32("max-memory", 1024, "fail where the list of files takes more than `N` MiB of memory"),
	}
	return f
}

func (f *Flags) open() (*content.Store, *image.Names, error) {
	store, err := content.Open(*f.root)
	if err != nil {
		return nil, nil, err
	}
	names, err := image.OpenNames(store, *f.namespace)
	return store, names, err
}

// Platform returns --platform.
func (f *Flags) Platform() string { return *f.platform }

// Memory returns --max-memory in bytes.
func (f *Flags) Memory() int64 { return int64(*f.maxMemory) << 20 }

// Layers returns the layers that a user names, the lowest first. ref is a name, the digest of a manifest or index, the
// digest of a layer, or - for a layer on standard input, which can be read once.
func (f *Flags) Layers(ctx context.Context, ref string) ([]look.Layer, error) {
	if ref == "-" {
		return []look.Layer{{Source: stdin{}}}, nil
	}
	store, names, err := f.open()
	if err != nil {
		return nil, err
	}
	w := image.Walker{Store: store}
	if w.Platform, err = image.ParsePlatform(*f.platform); err != nil {
		return nil, err
	}
	img, err := w.Target(ctx, names, ref)
	if err != nil {
		return nil, err
	}
	if dgst := img.Target.Digest; dgst == digest.Digest(ref) && img.Target.MediaType == image.Octets {
		lone := image.Layer{Descriptor: v1.Descriptor{Digest: dgst, Size: img.Target.Size}}
		return []look.Layer{{Layer: lone, Source: look.Stored(store, lone)}}, nil
	}
	return look.Layers(ctx, w, img)
}

// stdin is the layer on standard input.
type stdin struct{}

func (stdin) Walk(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	in, err := cli.LayerStdin(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	return look.Stream(ctx, in, "", "", only, f)
}
