package image

import (
	"iter"
	"sync"

	"distkit/content"
	"distkit/disk/layout"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Watched is a Listing that can tell whether it is still current.
type Watched struct {
	Listing
	from   *markedNames
	tagged func() map[string]v1.Descriptor
}

// Watch returns the current names. The caller must close the result.
func (n *Names) Watch() (*Watched, error) {
	m, ix, err := openMarked(n)
	if err != nil {
		return nil, err
	}
	m.entries = nil // only a sweep needs them
	w := &Watched{Listing: Listing{index: ix}, from: m}
	w.tagged = sync.OnceValue(w.readTagged)
	return w, nil
}

// Current reports whether no name has changed since.
func (w *Watched) Current() bool { return w.from.file != nil && w.from.current() }

// Targets yields the targets of all entries, with or without a name, each digest once. It skips entries that are not
// descriptors.
func (w *Watched) Targets() iter.Seq[v1.Descriptor] {
	return func(yield func(v1.Descriptor) bool) {
		seen := map[digest.Digest]bool{}
		for _, e := range w.index.Entries {
			d, err := e.Target(func(string, string) {})
			if err != nil || seen[d.Digest] || content.Validate(d.Digest) != nil {
				continue
			}
			if seen[d.Digest] = true; !yield(d) {
				return
			}
		}
	}
}

// Tagged returns the descriptor of a document that is attached by a referrer tag ([layout.ParseReferrerTag]). The store
// keeps the tag in an annotation of an entry without a name.
func (w *Watched) Tagged(tag string) (d v1.Descriptor, ok bool) {
	if _, _, is := layout.ParseReferrerTag(tag); is {
		d, ok = w.tagged()[tag]
	}
	return d, ok
}

// readTagged returns everything that Tagged can return. The first of several entries with the same tag counts.
func (w *Watched) readTagged() map[string]v1.Descriptor {
	all := map[string]v1.Descriptor{}
	for _, e := range w.index.Entries {
		if e.DependsOn() == "" {
			continue
		}
		tag := ""
		d, err := e.Target(func(key, value string) {
			if key == layout.AnnotationTag {
				tag = value
			}
		})
		if _, there := all[tag]; tag != "" && !there && err == nil && content.Validate(d.Digest) == nil {
			all[tag] = d
		}
	}
	return all
}

// Close closes the index.json that the names are from.
func (w *Watched) Close() {
	if w.from.file != nil {
		_ = w.from.file.Close()
	}
}
