// Dist-resolve prints the descriptors of tags and digests at a remote.
package main

import (
	"cmp"
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

// command is one call with its flags.
type command struct {
	*cobra.Command
	records                    *cli.Records
	platform                   string
	fields, ref, parse, limits bool
	remotes                    *registry.Remotes
}

func newCommand() *cobra.Command {
	c := &command{Command: &cobra.Command{
		Use:   "dist-resolve [flags] LOCATOR OBJECT…|REF…",
		Short: "print the descriptors of tags and digests",
		Args:  cobra.ArbitraryArgs,
	}}
	c.remotes = registry.NewRemotes(registry.Flags(c.Command))
	c.records = cli.NewRecords(c.Command, "DIGEST", "SIZE", "TYPE", "OBJECT")
	f := c.Flags()
	f.StringVar(&c.platform, "platform", "", "walk an index to the one manifest for `PLATFORM`, as linux/amd64")
	f.BoolVar(&c.fields, "fields", false, "print a record, DIGEST, SIZE, TYPE and OBJECT, instead of JSON")
	f.BoolVar(&c.ref, "ref", false, "the operands are references, LOCATOR[:TAG][@DIGEST]: print NAME, LOCATOR, DIGEST, SIZE and TYPE")
	f.BoolVar(&c.parse, "parse", false, "take references apart, and ask nobody: print NAME, LOCATOR and OBJECT")
	f.BoolVar(&c.limits, "limits", false, "print how often the registry may be asked: LIMIT, REMAINING, WINDOW in seconds and SOURCE")
	c.MarkFlagsMutuallyExclusive("ref", "parse", "limits")
	c.RunE = func(_ *cobra.Command, args []string) error { return c.run(args) }
	return c.Command
}

func (c *command) run(args []string) error {
	var do func(object string) error
	objects := args
	switch {
	case c.parse:
		c.records.Columns("NAME", "LOCATOR", "OBJECT")
		do = c.parseReference
	case c.ref:
		c.records.Columns("NAME", "LOCATOR", "DIGEST", "SIZE", "TYPE")
		do = c.resolveReference
	case len(args) == 0:
		return cli.Usagef("a LOCATOR is missing; usage: %s", c.UseLine())
	default:
		var open func(string) (remotes.Remote, string, error)
		var err error
		if objects, open, err = c.remotes.Objects(args); err != nil {
			return err
		}
		each := c.resolve
		if c.limits {
			c.records.Columns("LIMIT", "REMAINING", "WINDOW", "SOURCE")
			each = c.rateLimits
		} else if !c.fields && !c.records.Quiet() {
			if err := c.Flags().Set("json", "true"); err != nil {
				return err
			}
		}
		do = func(name string) error {
			r, object, err := open(name)
			if err != nil {
				return err
			}
			return each(r, object)
		}
	}
	err := cli.Each(c.Command, objects, do)
	return cmp.Or(err, c.records.Close())
}

func (c *command) descriptor(r remotes.Remote, object string) (ocispec.Descriptor, error) {
	if c.Flags().Changed("platform") {
		return remotes.ResolvePlatform(c.Context(), r, object, c.platform)
	}
	return r.Resolve(c.Context(), object)
}

func (c *command) resolve(r remotes.Remote, object string) error {
	desc, err := c.descriptor(r, object)
	if err != nil {
		return err
	}
	return c.records.Write(desc, desc.Digest, desc.Size, desc.MediaType, object)
}

func (c *command) parseReference(s string) error {
	ref, err := remotes.ParseReference(s)
	if err != nil {
		return err
	}
	return c.records.Write(ref, ref.Name, ref.Locator, ref.Object)
}

func (c *command) resolveReference(s string) error {
	ref, err := remotes.ParseReference(s)
	if err != nil {
		return err
	}
	r, err := c.remotes.Open(ref.Locator)
	if err != nil {
		return err
	}
	desc, err := c.descriptor(r, ref.Object)
	if err != nil {
		return err
	}
	if c.records.Quiet() {
		return c.records.Write(nil, desc.Digest)
	}
	value := struct {
		Name    string `json:"name"`
		Locator string `json:"locator"`
		ocispec.Descriptor
	}{ref.Name, ref.Locator, desc}
	return c.records.Write(value, ref.Name, ref.Locator, desc.Digest, cli.Size(desc.Size), cli.MediaType(desc.MediaType))
}

func (c *command) rateLimits(r remotes.Remote, object string) error {
	l, err := remotes.RateLimits(c.Context(), r, object)
	if err != nil {
		return err
	}
	seconds := int64(l.Window.Seconds())
	value := struct {
		Limit     int64  `json:"limit"`
		Remaining int64  `json:"remaining"`
		Window    int64  `json:"window"`
		Source    string `json:"source"`
	}{l.Limit, l.Remaining, seconds, l.Source}
	return c.records.Write(value, fmt.Sprint(l.Limit), l.Remaining, seconds, l.Source)
}
