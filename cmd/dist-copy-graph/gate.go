package main

import (
	"context"

	"distkit/cmd/internal/gate"
	"distkit/content"
	"distkit/image"
	"distkit/image/copygraph"
)

// admit lets the command of --verify, if there is one, decide on each manifest and the names that it will get. The
// store must have the manifests, and the namespace's index their referrers.
func (p places) admit(ctx context.Context, store *content.Store, namespace string, roots []root) error {
	if *p.verify == "" {
		return nil
	}
	names := p.tags
	if len(names) == 0 {
		names = []string{""}
	}
	check := gate.Gate{Command: *p.verify, Store: store, Namespace: namespace, Source: p.fromRemote}
	for _, r := range roots {
		for _, name := range names {
			if p.toRemote != "" && name != "" {
				name = p.toRemote + ":" + name
			}
			if err := check.Check(ctx, name, r.Digest); err != nil {
				return err
			}
		}
	}
	return nil
}

// admitAll is admit for a copy whose target is not the store. It runs before anything is copied. The documents are kept
// in a directory for the duration of the copy, which serves the command as a store.
func (p places) admitAll(ctx context.Context, g *copygraph.Copy, roots []root) error {
	namespace := *p.namespace
	switch {
	case g.From != nil:
		namespace = image.DefaultNamespace
		names, err := image.OpenNames(g.Documents, namespace)
		if err != nil {
			return err
		}
		if err := names.AddReferrers(ctx, g.Referring()); err != nil {
			return err
		}
	case p.fromRoot != "":
		namespace = image.DefaultNamespace
	}
	return p.admit(ctx, g.Documents, namespace, roots)
}
