package main

import (
	"strconv"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/content"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// maxRoots bounds how many graphs are copied at once.
const maxRoots = 1 << 12

// readRoots reads what is to be copied: one root by the arguments, or with "-" one from each line of standard input.
func readRoots(c *cobra.Command, args []string) (roots []v1.Descriptor, err error) {
	if args[0] != "-" {
		root, err := parseRoot(args)
		return append(roots, root), err
	}
	if len(args) > 1 {
		return nil, cli.Usagef("- stands alone; usage: %s", c.UseLine())
	}
	err = cli.EachLine(c, func(line string) error {
		if len(roots) == maxRoots {
			return cli.Usagef("standard input has more than %d records", maxRoots)
		}
		root, err := parseRoot(strings.Split(line, "\t"))
		roots = append(roots, root)
		return err
	})
	return roots, err
}

// parseRoot reads a digest, a size or "-", and a media type; the last two may be missing.
func parseRoot(fields []string) (v1.Descriptor, error) {
	d := v1.Descriptor{Digest: digest.Digest(fields[0]), Size: -1}
	if err := content.Validate(d.Digest); err != nil {
		return d, err
	}
	if len(fields) > 1 && fields[1] != "-" {
		n, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil || n < 0 {
			return d, cli.Usagef("%s: %.40q is no size in bytes", d.Digest, fields[1])
		}
		d.Size = n
	}
	if len(fields) > 2 {
		d.MediaType = fields[2]
	}
	return d, nil
}
