package main

import (
	"strconv"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/remotes"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// maxRoots bounds the number of graphs in one copy.
const maxRoots = 1 << 12

// root is a root of a graph to copy: a descriptor, or a tag that still has to be resolved.
type root struct {
	v1.Descriptor
	tag string
}

// readRoots reads the roots: one from the arguments or, with "-", one from each line of standard input.
func (p *places) readRoots(c *cobra.Command, args []string) (roots []root, err error) {
	if !p.fromBatch() && p.fromRoot == "" && p.intoStore() && p.toRef == "" && remotes.IsReference(args[0]) {
		p.ref = true // nothing else can be meant
	}
	switch {
	case p.toRef != "" && !p.ref:
		return nil, cli.Usagef("--to-ref is for --ref")
	case p.toRef != "" && p.toRemote != "":
		return nil, errTargets()
	case p.ref:
		r, err := p.parseReference(c, args)
		return append(roots, r), err
	}
	if args[0] != "-" {
		r, err := parseRoot(args)
		return append(roots, r), err
	}
	if len(args) > 1 {
		return nil, cli.Usagef("- stands alone; usage: %s", c.UseLine())
	}
	err = cli.EachLine(c, func(line string) error {
		if len(roots) == maxRoots {
			return cli.Usagef("standard input has more than %d records", maxRoots)
		}
		r, err := parseRoot(strings.Split(line, "\t"))
		roots = append(roots, r)
		return err
	})
	return roots, err
}

// parseReference parses the value of --ref. It sets the source and, unless --tag gives another, the name in the store.
func (p *places) parseReference(c *cobra.Command, args []string) (r root, err error) {
	if len(args) > 1 || p.fromRemote != "" {
		return r, cli.Usagef("--ref takes one REF, and no --from-remote; usage: %s", c.UseLine())
	}
	ref, err := remotes.ParseReference(args[0])
	if err != nil {
		return r, err
	}
	p.fromRemote = ref.Locator
	if p.toRef != "" {
		if err := p.parseTarget(ref); err != nil {
			return r, err
		}
	} else if len(p.tags) == 0 && p.intoStore() {
		p.tags = []string{ref.Name}
	}
	r.Size, r.tag = -1, ref.Object
	if d, err := digest.Parse(ref.Object); err == nil {
		r.Digest, r.tag = d, ""
	}
	return r, nil
}

// parseTarget parses the value of --to-ref. It sets the target. Unless --tag gives others, it also sets the tag: the
// reference's, or else the source's, which in a directory is the whole name. An image named by digest gets no tag. If
// both are repositories of one registry, blobs are mounted.
func (p *places) parseTarget(from remotes.Reference) error {
	to, err := remotes.ParseReference(p.toRef)
	if err != nil {
		return err
	}
	if strings.HasSuffix(p.toRef, "@"+to.Object) {
		return cli.Usagef("the target %s may not name a digest: that of the source stays", p.toRef)
	}
	p.toRemote = to.Locator
	source, err := remotes.ParseLocator(from.Locator)
	if err != nil {
		return err
	}
	target, err := remotes.ParseLocator(to.Locator)
	if err != nil {
		return err
	}
	if p.mount == "" && source.Host != "" && source.Host == target.Host && source.Name != target.Name {
		p.mount = source.Name
	}
	_, err = digest.Parse(from.Object)
	isDigest := err == nil
	switch {
	case len(p.tags) > 0:
	case strings.HasSuffix(p.toRef, ":"+to.Object):
		p.tags = []string{to.Object}
	case isDigest:
	case target.Host != "":
		p.tags = []string{from.Object[strings.LastIndexAny(from.Object, ":/")+1:]}
	case source.Host != "":
		p.tags = []string{from.Name}
	default:
		p.tags = []string{from.Object}
	}
	return nil
}

// parseRoot parses a digest or tag, a size or "-", and a media type. The last two may be missing.
func parseRoot(fields []string) (r root, err error) {
	r.Digest, r.Size = digest.Digest(fields[0]), -1
	if !strings.Contains(fields[0], ":") {
		r.Digest, r.tag = "", fields[0]
	} else if err := content.Validate(r.Digest); err != nil {
		return r, err
	}
	if len(fields) > 1 && fields[1] != "-" {
		r.Size, err = strconv.ParseInt(fields[1], 10, 64)
		if err != nil || r.Size < 0 {
			return r, cli.Usagef("%s: %.40q is not a size in bytes", fields[0], fields[1])
		}
	}
	if len(fields) > 2 {
		r.MediaType = fields[2]
	}
	return r, nil
}
