package main

import (
	"cmp"
	"slices"

	"distkit/cmd/internal/cli"
	"distkit/image/copygraph"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// output prints the records of a copy.
type output struct {
	*cli.Records
	command *cobra.Command
	brief   *bool
	last    v1.Descriptor // the last object that has landed
}

type record struct {
	Digest    digest.Digest     `json:"digest"`
	Size      int64             `json:"size"`
	MediaType string            `json:"mediaType"`
	State     copygraph.Outcome `json:"state"`
}

func newOutput(c *cobra.Command) *output {
	return &output{Records: cli.NewRecords(c, "DIGEST", "SIZE", "TYPE", "STATE"), command: c,
		brief: c.Flags().Bool("brief", false, "print a record of each layer that is left out, and last NAME and DIGEST of the image")}
}

// record prints an object's record immediately.
func (o *output) record(d v1.Descriptor, state copygraph.Outcome) error {
	o.last = d
	cells := []any{d.Digest, cli.Size(d.Size), cli.MediaType(d.MediaType), string(state)}
	if *o.brief {
		if o.Quiet() || state != copygraph.Foreign {
			return nil
		}
		o.Columns("DIGEST", "SIZE", "STATE")
		cells = slices.Delete(cells, 2, 3)
	}
	if err := o.Write(record{d.Digest, d.Size, d.MediaType, state}, cells...); err != nil {
		return err
	}
	return cli.Flush(o.command)
}

// end prints what follows the records. With --brief that is each name that the image has got, or else its digest.
func (o *output) end(names []string) error {
	if !*o.brief {
		return o.Close()
	}
	if o.Quiet() {
		return o.Write(nil, o.last.Digest)
	}
	err := o.Close()
	o.Columns("NAME", "DIGEST")
	for _, name := range names {
		value := struct {
			Name string `json:"name"`
			v1.Descriptor
		}{name, o.last}
		if err == nil {
			err = o.Write(value, name, o.last.Digest)
		}
	}
	return cmp.Or(err, o.Close())
}
