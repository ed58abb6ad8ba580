package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/disk/layout"
	"distkit/image"
	"distkit/image/copygraph"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// places are where a graph is copied from and to, as the flags name them.
type places struct {
	root, namespace    *string
	from, fromRoot, to string
	mount, sources     string
	tags, labels       []string
	referrers          []string // values of --referrers
}

// check returns an error if flags and roots do not go together.
func (p places) check(roots []root) error {
	switch {
	case p.from != "" && p.fromRoot != "":
		return cli.Usagef("--from and --from-root are two sources")
	case p.from == "" && p.fromRoot == "" && p.to == "":
		return cli.Usagef("the store is both source and target: one of --from, --from-root and --to is needed")
	case p.to == "" && (p.mount != "" || p.sources != ""):
		return cli.Usagef("--mount and --sources are for a target that is a command: --to is missing")
	case len(p.labels) > 0 && (p.to != "" || len(p.tags) == 0):
		return cli.Usagef("--label is for a --tag in the store")
	case len(p.tags) > 0 && len(roots) != 1:
		return cli.Usagef("--tag is for one manifest, not for %d", len(roots))
	case p.from == "" && slices.ContainsFunc(roots, func(r root) bool { return r.tag != "" }):
		return cli.Usagef("a tag is for --from; otherwise a digest is wanted")
	case p.from != "" && p.sources != "":
		return cli.Usagef("--sources is for a source that is a store: its labels tell")
	}
	return nil
}

// open opens the source and the target of a copy, and holds the stores among them. end is called when all is done; it returns
// the failure of a target that is a command.
func (p places) open(ctx context.Context, g *copygraph.Copy, roots []root) (end func() error, err error) {
	if err := p.check(roots); err != nil {
		return nil, err
	}
	referrers, err := p.setTypes(g)
	if err != nil {
		return nil, err
	}
	var ends []func() error
	endAll := func() (err error) {
		for _, f := range ends {
			if failed := f(); err == nil {
				err = failed
			}
		}
		return err
	}
	defer func() {
		if err != nil {
			_ = endAll()
		}
	}()
	store, err := content.Open(*p.root)
	if err != nil {
		return nil, err
	}
	source, namespace := store, *p.namespace
	switch {
	case p.from != "":
		from := copygraph.FromCommand(p.from, p.to == "")
		ends = append(ends, ignoring(from))
		g.From, source = from, nil
		if p.to != "" || !here(store, roots) {
			from.Start() // before anything else is done
		}
		if err := p.resolve(ctx, from, store, roots); err != nil {
			return nil, err
		}
		if referrers {
			g.Referrers = from.Referrers(g.ArtifactTypes...)
		}
	case p.fromRoot != "":
		if source, err = content.Open(p.fromRoot); err != nil {
			return nil, err
		}
		g.From, namespace = copygraph.FromStore(source), image.DefaultNamespace
	}
	if source != nil {
		if referrers {
			g.Referrers = copygraph.ReferrersOf(source, namespace)
		}
		if layout.IsStore(source.Tree) { // no sweep runs over another tool's layout
			if err := hold(ctx, source); err != nil {
				return nil, err
			}
		}
	}
	if p.to != "" {
		to := copygraph.IntoCommand(p.to)
		ends = append(ends, to.Close)
		g.To, g.Tags = to, p.tags
		if source != nil {
			g.Documents, g.From = source, nil
			return endAll, p.mounts(ctx, g, source, roots)
		}
		g.Mount = func(digest.Digest) string { return p.mount }
	} else {
		g.To = copygraph.IntoStore(store)
		if !g.DryRun {
			g.Documents = store
			return endAll, hold(ctx, store)
		}
		g.From = copygraph.Either{copygraph.FromStore(store), g.From}
	}
	scratch, err := os.MkdirTemp("", "dist-copy-graph-")
	if err != nil {
		return nil, err
	}
	ends = append(ends, func() error { return os.RemoveAll(scratch) })
	g.Documents, err = content.Open(scratch)
	return endAll, err
}

// here reports whether the store has all roots, so that perhaps nothing has to come.
func here(store *content.Store, roots []root) bool {
	for _, r := range roots {
		if _, err := store.Size(r.Digest); r.tag != "" || err != nil {
			return false
		}
	}
	return true
}

// resolve replaces tags by the descriptors that they point at. If the store has the first name of --tag already, probably
// nothing has changed: the source is asked for the digest alone, which registries do not count as a pull.
func (p places) resolve(ctx context.Context, from *copygraph.CommandSource, store *content.Store, roots []root) error {
	for i, r := range roots {
		if r.tag == "" {
			continue
		}
		ask := from.Resolve
		if p.to == "" && len(p.tags) > 0 {
			names, err := image.OpenNames(store, *p.namespace)
			if err != nil {
				return err
			}
			if _, err := names.Get(p.tags[0]); errdefs.IsNotFound(err) {
				ask = from.Take
			}
		}
		d, err := ask(ctx, r.tag)
		if err != nil {
			return err
		}
		if r.Size >= 0 {
			d.Size = r.Size // the copy checks it
		}
		if err := content.Validate(d.Digest); err != nil {
			return fmt.Errorf("resolve %s: the source tells: %w", r.tag, err)
		}
		roots[i].Descriptor = d
	}
	return nil
}

// ignoring returns a function that closes a source and ignores the error: the failures of a source are reported with their
// objects.
func ignoring(c io.Closer) func() error {
	return func() error {
		_ = c.Close()
		return nil
	}
}

// mounts has each blob mounted from the repository that labels of the store name for it, or else from that of --mount.
func (p places) mounts(ctx context.Context, g *copygraph.Copy, store *content.Store, roots []root) error {
	known := map[digest.Digest]string{}
	g.Mount = func(d digest.Digest) string {
		if from := known[d]; from != "" {
			return from
		}
		return p.mount
	}
	if p.sources == "" {
		return nil
	}
	host, repository, ok := strings.Cut(p.sources, "/")
	if !ok || host == "" || repository == "" {
		return cli.Usagef("--sources %.80q is not HOST/REPOSITORY", p.sources)
	}
	names, err := image.OpenNames(store, *p.namespace)
	if err != nil {
		return err
	}
	w := image.Walker{Store: store}
	for _, r := range roots {
		d := r.Descriptor
		if d.Size < 0 {
			if d, err = w.Describe(ctx, d.Digest); err != nil {
				return err
			}
		}
		list, err := names.Sources(ctx, w, d, host, repository)
		if err != nil {
			return err
		}
		for _, s := range list {
			known[s.Digest] = s.Repository
		}
	}
	return nil
}

// name gives what was copied the names of --tag in the store. Before that, it lists the referrers in the index.
func (p places) name(ctx context.Context, store *content.Store, d v1.Descriptor, referrers []v1.Descriptor) error {
	labels, err := cli.Labels(p.labels)
	if err != nil {
		return err
	}
	names, err := image.OpenNames(store, *p.namespace)
	if err != nil {
		return err
	}
	var images []image.Image
	for _, tag := range p.tags {
		images = append(images, image.Image{Name: tag, Target: d, Labels: labels})
	}
	if err := names.AddUnnamed(ctx, referrers); err != nil {
		return err
	}
	return names.ReplaceAll(ctx, images)
}

// hold holds a store against the sweep, for this process and those that it starts.
func hold(ctx context.Context, store *content.Store) error {
	env, err := store.Hold(ctx)
	if err != nil {
		return err
	}
	_, value, _ := strings.Cut(env, "=")
	return os.Setenv(content.HoldEnv, value)
}
