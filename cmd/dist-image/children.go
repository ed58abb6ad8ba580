package main

import (
	"context"

	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func newChildren() *cobra.Command {
	c := &cobra.Command{
		Use:   "children [flags] NAME|DIGEST",
		Short: "list what an index or manifest refers to: the platform's manifest, or config and layers",
	}
	mediaType := c.Flags().String("type", "", "fail where it should be an index or manifest, by this media `TYPE`, and is none")
	_, list := listDescriptors(c, func(w image.Walker, ctx context.Context, d v1.Descriptor) ([]v1.Descriptor, error) {
		if !image.IsIndex(*mediaType) && !image.IsManifest(*mediaType) {
			return w.Children(ctx, d)
		}
		d.MediaType = *mediaType
		children, err := w.Children(ctx, d)
		if errdefs.IsInvalidArgument(err) {
			err = errclass.As(err, errdefs.ErrDataLoss)
		}
		return children, err
	})
	c.RunE = func(c *cobra.Command, args []string) error {
		_, err := list(args[0])
		return err
	}
	return c
}
