// Dist-referrers lists the manifests that refer to others as their subject.
package main

import (
	"cmp"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	ocispec.Descriptor
	Subject digest.Digest `json:"subject"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-referrers [flags] LOCATOR DIGEST…|REF…",
		Short: "list what refers to a manifest, such as signatures",
		Args:  cobra.MinimumNArgs(1),
	}
	options := registry.Flags(c)
	filter := remotes.ReferrerFilter{Annotations: map[string]string{}}
	c.Flags().StringVar(&filter.ArtifactType, "artifact-type", "", "list artifacts of `TYPE` only")
	annotations := c.Flags().StringArray("annotation", nil, "list those with the annotation `KEY=VALUE` only; may be repeated")
	records := cli.NewRecords(c, "DIGEST", "TYPE", "SIZE", "SUBJECT")
	c.RunE = func(c *cobra.Command, args []string) error {
		for _, a := range *annotations {
			key, value, ok := strings.Cut(a, "=")
			if !ok || key == "" {
				return cli.Usagef("--annotation wants KEY=VALUE, got %q", a)
			}
			filter.Annotations[key] = value
		}
		objects, open, err := registry.NewRemotes(options).Objects(args)
		if err != nil {
			return err
		}
		err = cli.Each(c, objects, func(name string) error {
			r, object, err := open(name)
			if err != nil {
				return err
			}
			subject, err := digest.Parse(object)
			switch {
			case err == nil:
			case object == name:
				return cli.Usagef("digest %q: %v: resolve a tag first, or write LOCATOR:TAG", object, err)
			default:
				desc, err := r.Resolve(c.Context(), object)
				if err != nil {
					return err
				}
				subject = desc.Digest
			}
			for desc, err := range r.Referrers(c.Context(), subject, filter) {
				if err != nil {
					return err
				}
				if err := records.Write(record{desc, subject}, desc.Digest, cli.MediaType(desc.ArtifactType), cli.Size(desc.Size), subject); err != nil {
					return err
				}
			}
			return nil
		})
		return cmp.Or(err, records.Close())
	}
	return c
}
