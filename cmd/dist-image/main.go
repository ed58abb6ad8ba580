// Command dist-image keeps the names of a store and reads what they point at.
package main

import (
	"context"
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func main() {
	c := &cobra.Command{
		Use:   "dist-image VERB",
		Short: "name images, and read their manifests and configs",
	}
	c.AddCommand(newCreate(), newUpdate(), newLabel(), newLs(), newMv(), newRm(), newDu(), newManifest(), newConfig(), newLayers(), newChain(), newChildren(), newCheck(), newConvert(), newSources(), newTarget(), newTree(), newDiff())
	cli.Main(c)
}

// flags are the flags of all verbs. Verbs that walk an index have --platform too.
type flags struct {
	root, namespace *string
	platform        *string
	allPlatforms    *bool
	names           *image.Names // set when the store is opened
}

func newFlags(c *cobra.Command) *flags {
	return &flags{root: cli.Root(c.Flags()), namespace: cli.Namespace(c.Flags())}
}

func newPlatformFlags(c *cobra.Command) *flags {
	f := newFlags(c)
	f.platform = c.Flags().String("platform", "", "the `PLATFORM` of an index: os/arch[/variant] (default: this machine's)")
	return f
}

func (f *flags) open() (*content.Store, *image.Names, error) {
	store, err := content.Open(*f.root)
	if err != nil {
		return nil, nil, err
	}
	names, err := image.OpenNames(store, *f.namespace)
	if err != nil {
		return nil, nil, err
	}
	f.names = names
	// Snapshots are in the store, even if the root is the directory of a namespace.
	*f.root = store.Root()
	if namespace := store.Namespace(); namespace != "" {
		*f.namespace = namespace
	}
	return store, names, nil
}

// walker opens the store and finds the target of ref, a name or a digest.
func (f *flags) walker(ctx context.Context, ref string) (image.Walker, v1.Descriptor, error) {
	store, names, err := f.open()
	if err != nil {
		return image.Walker{}, v1.Descriptor{}, err
	}
	w := image.Walker{Store: store}
	if f.allPlatforms == nil || !*f.allPlatforms {
		if w.Platform, err = image.ParsePlatform(*f.platform); err != nil {
			return w, v1.Descriptor{}, err
		}
	}
	img, err := w.Target(ctx, names, ref)
	return w, img.Target, err
}

// descriptor returns the target for a name, given by arg: a digest, a descriptor on standard input (-), or another
// name. Labels of that name that describe the content come with it. Whether the target is allowed is checked when the
// name is made.
func descriptor(c *cobra.Command, store *content.Store, names *image.Names, arg string) (v1.Descriptor, error) {
	if arg == "-" {
		in, err := cli.Stdin(c.Context())
		if err != nil {
			return v1.Descriptor{}, err
		}
		defer in.Close()
		return image.ReadDescriptor(in)
	}
	img, err := image.Walker{Store: store}.Target(c.Context(), names, arg)
	if err != nil {
		return v1.Descriptor{}, err
	}
	img.Target.Annotations = img.ContentLabels()
	return img.Target, nil
}

func printTarget(c *cobra.Command, img image.Image) error {
	_, err := fmt.Fprintf(c.OutOrStdout(), "%s\t%s\n", img.Name, img.Target.Digest)
	return err
}

// listDescriptors makes c a verb that prints descriptors found from an image. The function that it returns prints them
// and returns their number.
func listDescriptors(c *cobra.Command, find func(image.Walker, context.Context, v1.Descriptor) ([]v1.Descriptor, error)) (*flags, func(ref string) (int, error)) {
	c.Args = cobra.ExactArgs(1)
	f := newPlatformFlags(c)
	f.allPlatforms = c.Flags().Bool("all-platforms", false, "every manifest of an index")
	c.MarkFlagsMutuallyExclusive("all-platforms", "platform")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE")
	return f, func(ref string) (int, error) {
		w, d, err := f.walker(c.Context(), ref)
		if err != nil {
			return 0, err
		}
		found, err := find(w, c.Context(), d)
		if err != nil {
			return 0, err
		}
		for _, d := range found {
			if err := records.Write(d, d.Digest, cli.Size(d.Size), cli.MediaType(d.MediaType)); err != nil {
				return 0, err
			}
		}
		return len(found), records.Close()
	}
}
