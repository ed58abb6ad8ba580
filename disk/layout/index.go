package layout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"time"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Bounds of an index.json: its bytes, its entries, and its other members. 25,000 names take about 8 MiB.
const (
	maxIndex   = 128 << 20
	maxEntries = 1 << 20
	maxFields  = 1 << 10
)

// Index is an index.json of which everything that is not changed is written back as it was, fields unknown here
// included.
type Index struct {
	Fields  map[string]json.RawMessage // but for "manifests"
	Entries []Entry
}

// Entry is a descriptor of an index.
type Entry struct {
	Raw  json.RawMessage
	Name string // the annotation org.opencontainers.image.ref.name; "" if there is none
}

// NewEntry encodes a descriptor, whose annotations hold its name.
func NewEntry(d v1.Descriptor) (Entry, error) {
	raw, err := json.Marshal(d)
	return Entry{raw, d.Annotations[v1.AnnotationRefName]}, err
}

// Descriptor decodes the entry. One that is no descriptor is FailedPrecondition.
func (e Entry) Descriptor() (v1.Descriptor, error) {
	var d v1.Descriptor
	if err := json.Unmarshal(e.Raw, &d); err != nil {
		return d, errclass.Errorf(errdefs.ErrFailedPrecondition, "entry %.80q of %s is no descriptor: %w", e.Name, v1.ImageIndexFile, err)
	}
	return d, nil
}

// parseEntry reads of an entry no more than its name. ok is false if that is not text, or the entry no object.
func parseEntry(raw json.RawMessage) (e Entry, ok bool) {
	e.Raw = raw
	var annotations, name json.RawMessage
	ok = Members(raw, func(key string, value json.RawMessage) {
		if key == "annotations" {
			annotations = value
		}
	})
	Members(annotations, func(key string, value json.RawMessage) {
		if key == v1.AnnotationRefName {
			name = value
		}
	})
	return e, ok && (name == nil || json.Unmarshal(name, &e.Name) == nil)
}

// Find returns where the name's entry is, or -1.
func (ix *Index) Find(name string) int {
	return slices.IndexFunc(ix.Entries, func(e Entry) bool { return e.Name == name && name != "" })
}

// Annotations of a name's entry: when it was first made, and when it last changed (RFC 3339, UTC).
const (
	AnnotationCreated = "distkit.created"
	AnnotationUpdated = "distkit.updated"
)

// Point gives target a name, new or not: the entry's other annotations stay, but for the time of the change. Further entries
// of that name go. It returns the annotations that are no names and no times.
func (ix *Index) Point(name string, target v1.Descriptor, now time.Time) (labels map[string]string, made bool, err error) {
	stamp := now.UTC().Format(time.RFC3339Nano)
	all := map[string]string{AnnotationCreated: stamp}
	at := ix.Find(name)
	if made = at < 0; made {
		at = len(ix.Entries)
		ix.Entries = append(ix.Entries, Entry{})
	} else {
		old, err := ix.Entries[at].Descriptor()
		if err != nil {
			return nil, false, err
		}
		all = map[string]string{}
		maps.Copy(all, old.Annotations)
	}
	labels = maps.Clone(all)
	maps.DeleteFunc(labels, func(k, _ string) bool {
		return k == v1.AnnotationRefName || k == AnnotationCreated || k == AnnotationUpdated
	})
	all[v1.AnnotationRefName], all[AnnotationUpdated] = name, stamp
	target.Annotations = all
	if ix.Entries[at], err = NewEntry(target); err != nil {
		return nil, false, err
	}
	rest := slices.DeleteFunc(ix.Entries[at+1:], func(e Entry) bool { return e.Name == name })
	ix.Entries = ix.Entries[:at+1+len(rest)]
	return labels, made, nil
}

// ReadIndex returns the names as they are now: none if there is no layout yet, FailedPrecondition if there is one without
// an index.json, or with a damaged one.
func (d Dir) ReadIndex() (*Index, error) {
	for range 3 {
		b, err := d.Tree.ReadFile(d.File(v1.ImageIndexFile), maxIndex)
		if err == nil {
			return d.parse(b)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read names: %w", err)
		}
		if there, err := d.Exists(); err != nil {
			return nil, err
		} else if !there {
			break
		}
	}
	return &Index{Fields: map[string]json.RawMessage{}}, nil
}

func (d Dir) parse(b []byte) (*Index, error) {
	damaged := func(format string, args ...any) (*Index, error) {
		return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is not an OCI index: "+format, append([]any{d.Path(v1.ImageIndexFile)}, args...)...)
	}
	if !json.Valid(b) {
		return damaged("%w", json.Unmarshal(b, new(json.RawMessage)))
	}
	ix := &Index{Fields: map[string]json.RawMessage{}}
	var manifests json.RawMessage
	object := Members(b, func(key string, value json.RawMessage) {
		if key == "manifests" {
			manifests = value
		} else if len(ix.Fields) <= maxFields {
			ix.Fields[key] = value
		}
	})
	switch {
	case !object:
		return damaged("it is no object")
	case len(ix.Fields) > maxFields:
		return damaged("it has more than %d members", maxFields)
	case manifests == nil || string(manifests) == "null":
		return ix, nil
	}
	n, strange := 0, -1
	array := Elements(manifests, func(value json.RawMessage) {
		if n++; n > maxEntries || strange >= 0 {
			return
		}
		e, ok := parseEntry(value)
		if !ok {
			strange = n - 1
		}
		ix.Entries = append(ix.Entries, e)
	})
	switch {
	case !array:
		return damaged("manifests is no array")
	case n > maxEntries:
		return damaged("it has more than %d manifests", maxEntries)
	case strange >= 0:
		return damaged("entry %d of its manifests is no descriptor", strange)
	}
	return ix, nil
}

// encode puts together what is valid JSON already, piece by piece: checking ten thousand names again would be most of the
// work of adding one.
func (ix *Index) encode() ([]byte, error) {
	size := 64
	for _, e := range ix.Entries {
		size += len(e.Raw) + 1
	}
	b := make([]byte, 0, size)
	for i, key := range slices.Sorted(maps.Keys(withManifests(ix.Fields))) {
		quoted, err := json.Marshal(key)
		if err != nil {
			return nil, err
		}
		b = append(append(append(b, "{,"[min(i, 1)]), quoted...), ':')
		if key != "manifests" {
			b = append(b, ix.Fields[key]...)
			continue
		}
		b = append(b, '[')
		for i, e := range ix.Entries {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, e.Raw...)
		}
		b = append(b, ']')
	}
	return append(b, "}\n"...), nil
}

func withManifests(fields map[string]json.RawMessage) map[string]json.RawMessage {
	all := maps.Clone(fields)
	all["manifests"] = nil
	return all
}

// Change locks index.json, lets f change what it says, and puts the new one in its place: written aside, synced, renamed,
// the directory synced (distkit-layout(5), NAMES). create is called first, and again if the layout was removed while this
// waited for the lock: it makes the layout where that is missing. A sweep may have the lock for minutes: Change waits until ctx
// is done.
func (d Dir) Change(ctx context.Context, create func() error, f func(*Index) error) error {
	lock, err := d.lockIndex(ctx, create)
	if err != nil {
		return err
	}
	defer disk.Release(lock)
	b, err := disk.ReadAll(lock, maxIndex)
	if err != nil {
		return fmt.Errorf("read names: %s: %w", d.Path(v1.ImageIndexFile), err)
	}
	ix, err := d.parse(b)
	if err != nil {
		return err
	}
	if err := f(ix); err != nil {
		return err
	}
	if b, err = ix.encode(); err != nil {
		return fmt.Errorf("encode names: %w", err)
	}
	if len(b) > maxIndex || len(ix.Entries) > maxEntries {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "too many names: %s would have %d entries and %d bytes",
			d.Path(v1.ImageIndexFile), len(ix.Entries), len(b))
	}
	if err := d.Tree.Replace(d.File(v1.ImageIndexFile), b, 0o666, true); err != nil {
		return fmt.Errorf("write names: %w", err)
	}
	return nil
}

// lockTries bounds how often a layout is made anew because others keep removing it.
const lockTries = 100

func (d Dir) lockIndex(ctx context.Context, create func() error) (*os.File, error) {
	for n := 1; ; n++ {
		if err := create(); err != nil {
			return nil, err
		}
		f, err := d.LockIndex(ctx, unix.LOCK_EX)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, fs.ErrNotExist) || n == lockTries {
			return nil, fmt.Errorf("lock names: %w", err)
		}
	}
}

// LockIndex locks index.json: nobody changes a name while it is locked. how is as for [disk.Lock]. fs.ErrNotExist if there
// is none.
func (d Dir) LockIndex(ctx context.Context, how int) (*os.File, error) {
	// NFS locks exclusively only what is open for writing.
	f, err := d.Tree.LockFileContext(ctx, d.File(v1.ImageIndexFile), os.O_RDWR, 0, how)
	if errors.Is(err, fs.ErrPermission) {
		f, err = d.Tree.LockFileContext(ctx, d.File(v1.ImageIndexFile), os.O_RDONLY, 0, how)
	}
	return f, err
}
