// Command dist-image keeps the names of a store and reads what they point at.
package main

import (
	"context"
	"fmt"
	"maps"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/content"
	"distkit/image"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func main() {
	c := &cobra.Command{
		Use:   "dist-image VERB",
		Short: "Give names to what is in the store, and read what they point at",
	}
	c.AddCommand(newCreate(), newUpdate(), newLabel(), newLs(), newRm(), newManifest(), newConfig(), newLayers(), newChain(), newChildren(), newCheck(), newSources(), newTarget())
	cli.Main(c)
}

// flags are those that every verb has; the verbs that walk an index have a platform too.
type flags struct {
	root, namespace *string
	platform        *string
	allPlatforms    *bool
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
	// Snapshots are the store's, also if the root is the directory of a namespace.
	*f.root = store.Root()
	if namespace := store.Namespace(); namespace != "" {
		*f.namespace = namespace
	}
	return store, names, nil
}

// walker opens the store and finds what ref, a name or a digest, points at.
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
	if dgst, err := digest.Parse(ref); err == nil {
		d, err := w.Describe(ctx, dgst)
		return w, d, err
	}
	img, err := names.Get(ref)
	return w, img.Target, err
}

func newCreate() *cobra.Command {
	c := &cobra.Command{
		Use:   "create [flags] NAME DIGEST|-",
		Short: "Name a manifest or index of the store; - reads its descriptor from standard input",
		Args:  cobra.ExactArgs(2),
	}
	f := newFlags(c)
	replace := c.Flags().Bool("replace", false, "let a name that exists point at it from now on")
	labels := c.Flags().StringArray("label", nil, "set the label `KEY=VALUE`; without a value take it away")
	c.RunE = func(c *cobra.Command, args []string) error {
		store, names, err := f.open()
		if err != nil {
			return err
		}
		target, err := descriptor(c, store, args[1])
		if err != nil {
			return err
		}
		set, err := cli.Labels(*labels)
		if err != nil {
			return err
		}
		if target.Annotations == nil {
			target.Annotations = map[string]string{}
		}
		maps.Copy(target.Annotations, set)
		put := names.Create
		if *replace {
			put = names.Replace
		}
		img, err := put(c.Context(), args[0], target)
		if err != nil {
			return err
		}
		return printTarget(c, img)
	}
	return c
}

// descriptor is what a name is to point at. Whether a name can is checked when it is made.
func descriptor(c *cobra.Command, store *content.Store, arg string) (v1.Descriptor, error) {
	if arg != "-" {
		dgst, err := digest.Parse(arg)
		if err != nil {
			return v1.Descriptor{}, cli.Usagef("digest %q: %v", arg, err)
		}
		return image.Walker{Store: store}.Describe(c.Context(), dgst)
	}
	in, err := cli.Stdin(c.Context())
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer in.Close()
	return image.ReadDescriptor(in)
}

func newLs() *cobra.Command {
	c := &cobra.Command{
		Use:   "ls [flags] [FILTER…]",
		Short: "List names",
		Args:  cobra.ArbitraryArgs,
	}
	f := newPlatformFlags(c)
	records := cli.NewRecords(c, "REF", "TYPE", "DIGEST", "SIZE", "UPDATED")
	c.RunE = func(c *cobra.Command, args []string) error {
		wanted, err := filter.Parse(args)
		if err != nil {
			return err
		}
		store, names, err := f.open()
		if err != nil {
			return err
		}
		w := image.Walker{Store: store}
		if w.Platform, err = image.ParsePlatform(*f.platform); err != nil {
			return err
		}
		all, err := names.List()
		if err != nil {
			return err
		}
		for _, img := range all {
			if ok, err := wanted.Match(img); err != nil {
				return err
			} else if !ok {
				continue
			}
			r := record{Name: img.Name, Target: img.Target, Labels: img.Labels, CreatedAt: img.CreatedAt, UpdatedAt: img.UpdatedAt}
			if !records.Quiet() {
				// What can't be told, since blobs are missing or it is no image, is 0.
				r.Size, _ = w.Size(c.Context(), img.Target)
			}
			if err := records.Write(r, r.Name, r.Target.MediaType, r.Target.Digest, cli.Size(r.Size), r.UpdatedAt); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}

// record is a name as --json shows it.
type record struct {
	Name      string            `json:"name"`
	Target    v1.Descriptor     `json:"target"`
	Size      int64             `json:"size"` // of the whole image for the platform; 0 when it can't be told
	Labels    map[string]string `json:"labels,omitempty"`
	CreatedAt time.Time         `json:"createdAt,omitzero"`
	UpdatedAt time.Time         `json:"updatedAt,omitzero"`
}

func newRm() *cobra.Command {
	c := &cobra.Command{
		Use:   "rm [flags] NAME…|-",
		Short: "Take names away; the blobs stay",
		Args:  cobra.ArbitraryArgs,
	}
	f := newFlags(c)
	zero := c.Flags().BoolP("zero", "z", false, "names on standard input and output end with NUL instead of newline")
	c.RunE = func(c *cobra.Command, args []string) error {
		_, names, err := f.open()
		if err != nil {
			return err
		}
		end := "\n"
		if *zero {
			end = "\x00"
		}
		return cli.Each(c, args, func(name string) error {
			if err := names.Delete(c.Context(), name); err != nil {
				return err
			}
			_, err := fmt.Fprint(c.OutOrStdout(), name, end)
			return err
		})
	}
	return c
}
