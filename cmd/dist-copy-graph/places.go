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
	"distkit/remotes"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// places are the source and the target of a copy, as the flags name them.
type places struct {
	root, namespace      *string
	from, fromRemote, to string
	fromRoot, toRemote   string
	ref                  bool
	toRef                string
	options              *remotes.Options
	mount, sources       string
	tags, labels         []string
	referrers            *cli.Referrers
	verify               *string
}

// intoStore reports whether the target is the store.
func (p places) intoStore() bool { return p.to == "" && p.toRemote == "" }

// fromBatch reports whether the source is accessed by the batch protocol, and not a store.
func (p places) fromBatch() bool { return p.from != "" || p.fromRemote != "" }

// check returns an error if the flags and roots do not fit together.
func (p places) check(roots []root) error {
	switch {
	case p.fromBatch() && p.fromRoot != "" || p.from != "" && p.fromRemote != "":
		return cli.Usagef("--from, --from-remote, --from-root and --ref exclude each other: each is a source")
	case p.to != "" && p.toRemote != "":
		return errTargets()
	case !p.fromBatch() && p.fromRoot == "" && p.intoStore():
		return cli.Usagef("the store is both source and target: one of --ref, --from, --from-remote, --from-root, --to, --to-remote and --to-ref is needed")
	case p.intoStore() && (p.mount != "" || p.sources != ""):
		return cli.Usagef("--mount and --sources are for a target other than the store: --to, --to-remote or --to-ref is missing")
	case len(p.labels) > 0 && (!p.intoStore() || len(p.tags) == 0):
		return cli.Usagef("--label is for a --tag in the store")
	case len(p.tags) > 0 && len(roots) != 1:
		return cli.Usagef("--tag is for one manifest, not for %d", len(roots))
	case !p.fromBatch() && slices.ContainsFunc(roots, func(r root) bool { return r.tag != "" }):
		return cli.Usagef("a tag is for --from and --from-remote; otherwise a digest is wanted")
	case p.fromBatch() && p.sources != "":
		return cli.Usagef("--sources is for a source that is a store: its labels tell")
	}
	return nil
}

func errTargets() error {
	return cli.Usagef("--to, --to-remote and --to-ref exclude each other: each is a target")
}

// open opens the source and the target of a copy, and locks stores among them against sweeps. The caller must call end
// when the copy is done. end returns the error of a target that is a command.
func (p places) open(ctx context.Context, g *copygraph.Copy, roots []root) (end func() error, err error) {
	if err := p.check(roots); err != nil {
		return nil, err
	}
	types, referrers, err := p.referrers.Wanted()
	if err != nil {
		return nil, err
	}
	g.ArtifactTypes = types
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
	source, err := p.openSource(ctx, g, store, roots, referrers, &ends)
	if err != nil {
		return nil, err
	}
	if !p.intoStore() {
		to, err := p.target()
		if err != nil {
			return nil, err
		}
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

// openSource opens the source, and adds what ends it to ends. It returns the store if the source is one, and holds that.
func (p places) openSource(ctx context.Context, g *copygraph.Copy, store *content.Store, roots []root, referrers bool, ends *[]func() error) (*content.Store, error) {
	if p.fromBatch() {
		from, err := p.source()
		if err != nil {
			return nil, err
		}
		*ends = append(*ends, ignoring(from))
		g.From = from
		if !p.intoStore() || !here(store, roots) {
			from.Start() // it starts while the stores are opened
		}
		if err := p.resolve(ctx, from, store, roots); err != nil {
			return nil, err
		}
		if referrers {
			g.Referrers = from.Referrers(g.ArtifactTypes...)
		}
		return nil, nil
	}
	source, namespace := store, *p.namespace
	if p.fromRoot != "" {
		var err error
		if source, err = content.Open(p.fromRoot); err != nil {
			return nil, err
		}
		g.From, namespace = copygraph.FromStore(source), image.DefaultNamespace
	}
	if referrers {
		g.Referrers = copygraph.ReferrersOf(source, namespace)
	}
	if !layout.IsStore(source.Tree) { // another tool's layout is never swept
		return source, nil
	}
	return source, hold(ctx, source)
}

// source returns a source that is accessed by the batch protocol. Its objects are verified by the store, or else by the
// remote's client.
func (p places) source() (*copygraph.CommandSource, error) {
	if p.fromRemote == "" {
		return copygraph.FromCommand(p.from, p.intoStore()), nil
	}
	o := *p.options
	o.Unverified = p.intoStore()
	r, err := remotes.OpenBatch(p.fromRemote, o)
	if err != nil {
		return nil, err
	}
	fetch := r.Fetch
	if _, isHelper := r.(*remotes.Helper); isHelper {
		fetch = nil // one process for the batch, or one for each object
	}
	return copygraph.FromServer(func(ctx context.Context, in io.Reader, out io.Writer) error {
		return remotes.FetchBatch(ctx, r, in, out)
	}, fetch), nil
}

// target returns a target that is not the store.
func (p places) target() (*copygraph.CommandTarget, error) {
	if p.toRemote == "" {
		return copygraph.IntoCommand(p.to), nil
	}
	r, err := remotes.OpenBatch(p.toRemote, *p.options)
	return copygraph.IntoServer(func(ctx context.Context, in io.Reader, out io.Writer) error {
		return remotes.PutBatch(ctx, r, in, out)
	}), err
}

// here reports whether the store has all roots, so that perhaps nothing needs to be copied.
func here(store *content.Store, roots []root) bool {
	for _, r := range roots {
		if _, err := store.Size(r.Digest); r.tag != "" || err != nil {
			return false
		}
	}
	return true
}

// resolve replaces tags by the descriptors that they stand for. If the target is the store and already has the first
// name of --tag, probably nothing has changed. Then resolve asks the source only for the digest, which registries do
// not count as a pull.
func (p places) resolve(ctx context.Context, from *copygraph.CommandSource, store *content.Store, roots []root) error {
	for i, r := range roots {
		if r.tag == "" {
			continue
		}
		ask := from.Resolve
		if len(roots) == 1 {
			ask = from.Take // keeps what it fetches in memory
		}
		if p.intoStore() {
			names, err := image.OpenNames(store, *p.namespace)
			if err != nil {
				return err
			}
			if len(p.tags) == 0 {
				ask = from.Resolve
			} else if _, err := names.Get(p.tags[0]); !errdefs.IsNotFound(err) {
				ask = from.Resolve
			}
		}
		d, err := ask(ctx, r.tag)
		if err != nil {
			return err
		}
		if r.Size >= 0 {
			d.Size = r.Size // checked by the copy
		}
		if err := content.Validate(d.Digest); err != nil {
			return fmt.Errorf("resolve %s: the source tells: %w", r.tag, err)
		}
		roots[i].Descriptor = d
	}
	return nil
}

// ignoring returns a function that closes a source and ignores the error: failures of a source are reported with its
// objects.
func ignoring(c io.Closer) func() error {
	return func() error {
		_ = c.Close()
		return nil
	}
}

// mounts sets the repository to mount each blob from: the one in the labels of the store's blob, or else that of
// --mount.
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

// name gives the last object copied, d, the names of --tag in the store. Before that, it enters the referrers in the
// index, and has all roots admitted. It does not change a name that is right already.
func (p places) name(ctx context.Context, g *copygraph.Copy, roots []root, d v1.Descriptor) error {
	store := g.Documents
	labels, err := cli.Labels(p.labels)
	if err != nil {
		return err
	}
	if l, err := remotes.ParseLocator(p.fromRemote); err == nil && l.Host != "" {
		label := layout.LabelSource + l.Host
		if _, given := labels[label]; !given {
			labels[label] = l.Name
		}
	}
	names, err := image.OpenNames(store, *p.namespace)
	if err != nil {
		return err
	}
	var images []image.Image
	for _, tag := range p.tags {
		has, err := names.Get(tag)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if err != nil || has.Target.Digest != d.Digest || has.Target.Size != d.Size || has.Target.MediaType != d.MediaType || !within(labels, has.Labels) {
			images = append(images, image.Image{Name: tag, Target: d, Labels: labels})
		}
	}
	if err := names.AddReferrers(ctx, g.Referring()); err != nil {
		return err
	}
	if err := p.admit(ctx, store, *p.namespace, roots); err != nil {
		return err
	}
	return names.ReplaceAll(ctx, images)
}

// within reports whether all labels are in has, with the same values.
func within(labels, has map[string]string) bool {
	for key, value := range labels {
		if has[key] != value {
			return false
		}
	}
	return true
}

// hold locks a store against sweeps, for this process and its children.
func hold(ctx context.Context, store *content.Store) error {
	env, err := store.Hold(ctx)
	if err != nil {
		return err
	}
	_, value, _ := strings.Cut(env, "=")
	return os.Setenv(content.HoldEnv, value)
}
