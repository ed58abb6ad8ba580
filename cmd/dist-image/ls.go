package main

import (
	"cmp"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/content"
	"distkit/image"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func newLs() *cobra.Command {
	c := &cobra.Command{
		Use:   "ls [flags] [FILTER…]",
		Short: "list names",
		Args:  cobra.ArbitraryArgs,
	}
	f := newPlatformFlags(c)
	unnamed := c.Flags().BoolP("all", "a", false, "list entries of the index without a name, too, by their digest")
	contains := c.Flags().String("contains", "", "list only what has the blob of this `DIGEST`: a manifest, a config, a layer or any other")
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
		containing, err := parseContains(store, *contains)
		if err != nil {
			return err
		}
		listing, err := names.Read()
		if err != nil {
			return err
		}
		var failed error // reported after the others have been listed
		sizes := map[digest.Digest]int64{}
		list := func(img image.Image) error {
			if !wanted.All() {
				if ok, err := wanted.Match(img); err != nil || !ok {
					return err
				}
			}
			if ok, err := containing.Match(c.Context(), img.Target); !ok {
				if err != nil && c.Context().Err() != nil {
					return err
				}
				failed = cmp.Or(failed, err)
				return nil
			}
			ref := cmp.Or(img.Name, string(img.Target.Digest))
			if records.Quiet() {
				return records.Write(nil, ref)
			}
			size, known := sizes[img.Target.Digest]
			if !known {
				// 0 if unknown, because blobs are missing or it is not an image
				size, _ = w.Size(c.Context(), img.Target)
				sizes[img.Target.Digest] = size
			}
			r := record{Name: img.Name, Target: img.Target, Size: size, Labels: img.Labels, CreatedAt: img.CreatedAt, UpdatedAt: img.UpdatedAt}
			return records.Write(r, ref, cli.MediaType(r.Target.MediaType), r.Target.Digest, cli.Size(r.Size), r.UpdatedAt)
		}
		for img, err := range listing.All() {
			if err != nil {
				failed = cmp.Or(failed, err)
			} else if err := list(img); err != nil {
				return err
			}
		}
		if *unnamed {
			for _, img := range listing.Unnamed() {
				if err := list(img); err != nil {
					return err
				}
			}
		}
		return cmp.Or(records.Close(), failed)
	}
	return c
}

// parseContains parses the value of --contains. If it is empty, every target matches.
func parseContains(store *content.Store, arg string) (*image.Containing, error) {
	if arg == "" {
		return nil, nil
	}
	dgst, err := digest.Parse(arg)
	if err != nil {
		return nil, cli.Usagef("--contains %q: %v", arg, err)
	}
	return image.NewContaining(store, dgst), nil
}

// record is a name in the output of --json.
type record struct {
	Name      string            `json:"name"`
	Target    v1.Descriptor     `json:"target"`
	Size      int64             `json:"size"` // of the whole image for the platform; 0 if unknown
	Labels    map[string]string `json:"labels,omitempty"`
	CreatedAt time.Time         `json:"createdAt,omitzero"`
	UpdatedAt time.Time         `json:"updatedAt,omitzero"`
}
