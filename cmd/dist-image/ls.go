package main

import (
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/image"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

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
