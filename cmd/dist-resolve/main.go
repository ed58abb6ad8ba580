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

// command is one call, with its flags.
type command struct {
	*cobra.Command
	options                    *remotes.Options
	records                    *cli.Records
	platform                   string
	fields, ref, parse, limits bool
	opened                     map[string]remotes.Remote // by locator: one connection and one token for all
}

func newCommand() *cobra.Command {
	c := &command{opened: map[string]remotes.Remote{}, Command: &cobra.Command{
		Use:   "dist-resolve [flags] LOCATOR OBJECT…|-",
		Short: "print the descriptors of tags and digests",
		Args:  cobra.ArbitraryArgs,
	}}
	c.options = registry.Flags(c.Command)
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
	resolve := func(object string) error { return c.resolve(args[0], object) }
	objects := args
	switch {
	case c.parse:
		c.records.Columns("NAME", "LOCATOR", "OBJECT")
		resolve = c.parseReference
	case c.ref:
		c.records.Columns("NAME", "LOCATOR", "DIGEST", "SIZE", "TYPE")
		resolve = c.resolveReference
	case len(args) == 0:
		return cli.Usagef("a LOCATOR is missing; usage: %s", c.UseLine())
	default:
		if _, err := c.open(args[0]); err != nil {
			return err
		}
		objects = args[1:]
		if c.limits {
			c.records.Columns("LIMIT", "REMAINING", "WINDOW", "SOURCE")
			resolve = func(object string) error { return c.rateLimits(args[0], object) }
		} else if !c.fields && !c.records.Quiet() {
			if err := c.Flags().Set("json", "true"); err != nil {
				return err
			}
		}
	}
	err := cli.Each(c.Command, objects, resolve)
	return cmp.Or(err, c.records.Close())
}

func (c *command) open(locator string) (remotes.Remote, error) {
	if r := c.opened[locator]; r != nil {
		return r, nil
	}
	r, err := remotes.Open(locator, *c.options)
	if err == nil {
		c.opened[locator] = r
	}
	return r, err
}

func (c *command) descriptor(locator, object string) (ocispec.Descriptor, error) {
	r, err := c.open(locator)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if c.Flags().Changed("platform") {
		return remotes.ResolvePlatform(c.Context(), r, object, c.platform)
	}
	return r.Resolve(c.Context(), object)
}

func (c *command) resolve(locator, object string) error {
	desc, err := c.descriptor(locator, object)
	if err != nil {
		return err
	}
	return c.records.Write(desc, desc.Digest, cli.Size(desc.Size), cli.MediaType(desc.MediaType), object)
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
	desc, err := c.descriptor(ref.Locator, ref.Object)
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

func (c *command) rateLimits(locator, object string) error {
	r, err := c.open(locator)
	if err != nil {
		return err
	}
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
