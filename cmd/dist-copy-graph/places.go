package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"
	"distkit/image/copygraph"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// places are where a graph is copied from and to, as the flags name them.
type places struct {
	root, namespace    *string
	from, fromRoot, to string
	mount, sources     string
}

// open opens the source and the target of a copy, and holds the stores among them. end is called when all is done; it returns
// the failure of a target that is a command.
func (p places) open(ctx context.Context, g *copygraph.Copy, roots []v1.Descriptor) (end func() error, err error) {
	switch {
	case p.from != "" && p.fromRoot != "":
		return nil, cli.Usagef("--from and --from-root are two sources")
	case p.from == "" && p.fromRoot == "" && p.to == "":
		return nil, cli.Usagef("the store is both source and target: one of --from, --from-root and --to is needed")
	case p.to == "" && (len(g.Tags) > 0 || p.mount != "" || p.sources != ""):
		return nil, cli.Usagef("--tag, --mount and --sources are for a target that is a command: --to is missing")
	case p.from != "" && p.sources != "":
		return nil, cli.Usagef("--sources is for a source that is a store: its labels tell")
	}
	var ends []func() error
	end = func() (err error) {
		for _, f := range ends {
			if failed := f(); err == nil {
				err = failed
			}
		}
		return err
	}
	defer func() {
		if err != nil {
			_ = end()
		}
	}()
	store, err := content.Open(*p.root)
	if err != nil {
		return nil, err
	}
	source := store
	switch {
	case p.from != "":
		from := copygraph.FromCommand(p.from, p.to == "")
		ends = append(ends, ignoring(from))
		g.From, source = from, nil
	case p.fromRoot != "":
		if source, err = content.Open(p.fromRoot); err != nil {
			return nil, err
		}
		g.From = copygraph.FromStore(source)
	}
	if source != nil {
		if err := holdIfSwept(ctx, source); err != nil {
			return nil, err
		}
	}
	if p.to != "" {
		to := copygraph.IntoCommand(p.to)
		ends = append(ends, to.Close)
		g.To = to
		if source != nil {
			g.Documents, g.From = source, nil
			return end, p.mounts(ctx, g, source, roots)
		}
		g.Mount = func(digest.Digest) string { return p.mount }
	} else {
		g.To = copygraph.IntoStore(store)
		if !g.DryRun {
			g.Documents = store
			return end, hold(ctx, store)
		}
		g.From = copygraph.Either{copygraph.FromStore(store), g.From}
	}
	scratch, err := os.MkdirTemp("", "dist-copy-graph-")
	if err != nil {
		return nil, err
	}
	ends = append(ends, func() error { return os.RemoveAll(scratch) })
	g.Documents, err = content.Open(scratch)
	return end, err
}

// ignoring closes a source, whose failures are told with the objects that they are of.
func ignoring(c io.Closer) func() error {
	return func() error {
		_ = c.Close()
		return nil
	}
}

// mounts has blobs mounted from where labels of the store say that they are, else from the one repository that was named.
func (p places) mounts(ctx context.Context, g *copygraph.Copy, store *content.Store, roots []v1.Descriptor) error {
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
	for _, root := range roots {
		if root.Size < 0 {
			if root, err = w.Describe(ctx, root.Digest); err != nil {
				return err
			}
		}
		list, err := names.Sources(ctx, w, root, host, repository)
		if err != nil {
			return err
		}
		for _, s := range list {
			known[s.Digest] = s.Repository
		}
	}
	return nil
}

// holdIfSwept holds a store. A layout of other tools is not swept.
func holdIfSwept(ctx context.Context, store *content.Store) error {
	if _, err := os.Stat(filepath.Join(store.Root(), "ingest")); err != nil {
		return nil
	}
	return hold(ctx, store)
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
