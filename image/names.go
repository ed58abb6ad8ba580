// Package image knows what a manifest, an index and a config say, and which names a store
// gives to them. Names are the entries of an OCI layout's index.json (image-spec v1.1,
// image-layout.md), changed under a lock by atomic rename.
package image

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"distkit/content"
	"distkit/disk"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// The annotations of a name's entry: when it was first made, and when it last changed
// (RFC 3339, UTC).
const (
	AnnotationCreated = "distkit.created"
	AnnotationUpdated = "distkit.updated"
)

// DefaultNamespace is the namespace whose names stand in the store's own index.json.
const DefaultNamespace = "default"

// maxName and maxNamespace are bytes; the latter is containerd's limit on identifiers.
const (
	maxName      = 4096
	maxNamespace = 76
)

// Names are the names of one namespace of a store.
type Names struct {
	root      string // the store
	namespace string
	layout    *content.Store // the OCI layout that holds the names: the store, or a namespace's
}

// Image is a name and what it points at.
type Image struct {
	Name      string
	Target    v1.Descriptor // without the annotations that hold the name and its times
	Labels    map[string]string
	CreatedAt time.Time // zero where another tool wrote the entry
	UpdatedAt time.Time
}

// Field gives the fields that containerd's filters know: name, target.digest,
// target.mediatype, labels.KEY.
func (img Image) Field(fieldpath []string) (value string, present bool) {
	switch path := strings.Join(fieldpath, "."); {
	case path == "name":
		return img.Name, true
	case path == "target.digest":
		return string(img.Target.Digest), true
	case strings.EqualFold(path, "target.mediatype"):
		return img.Target.MediaType, img.Target.MediaType != ""
	case len(fieldpath) > 1 && fieldpath[0] == "labels":
		value, present = img.Labels[strings.Join(fieldpath[1:], ".")]
	}
	return value, present
}

// OpenNames selects a namespace of the store. It touches nothing on disk. A namespace that is
// no identifier is InvalidArgument, a layout version that is not known FailedPrecondition.
func OpenNames(store *content.Store, namespace string) (*Names, error) {
	if namespace == DefaultNamespace {
		return &Names{store.Root(), namespace, store}, nil
	}
	if !identifier(namespace) {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "namespace %.80q: letters, digits and single - . _ between them, %d at most",
			namespace, maxNamespace)
	}
	layout, err := content.Open(filepath.Join(store.Root(), "namespaces", namespace))
	if err != nil {
		return nil, err
	}
	return &Names{store.Root(), namespace, layout}, nil
}

// identifier is the rule of containerd's pkg/identifiers.
func identifier(s string) bool {
	if s == "" || len(s) > maxNamespace {
		return false
	}
	separator := true
	for _, r := range []byte(s) {
		switch {
		case '0' <= r && r <= '9', 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z':
			separator = false
		case r == '-' || r == '.' || r == '_':
			if separator {
				return false
			}
			separator = true
		default:
			return false
		}
	}
	return !separator
}

func checkName(name string) error {
	bad := func(r rune) bool { return !unicode.IsPrint(r) || r == ' ' }
	if name == "" || len(name) > maxName || !utf8.ValidString(name) || strings.ContainsFunc(name, bad) {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "name %.80q: printable text without spaces, %d bytes at most",
			name, maxName)
	}
	return nil
}

// Get returns the image of that name. NotFound when there is none.
func (n *Names) Get(name string) (Image, error) {
	ix, err := n.read()
	if err != nil {
		return Image{}, err
	}
	if at := ix.find(name); at >= 0 {
		return ix.entries[at].image()
	}
	return Image{}, fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound)
}

// List returns all images, sorted by name.
func (n *Names) List() ([]Image, error) {
	ix, err := n.read()
	if err != nil {
		return nil, err
	}
	var all []Image
	for _, e := range ix.entries {
		if e.name == "" {
			continue
		}
		img, err := e.image()
		if err != nil {
			return nil, err
		}
		all = append(all, img)
	}
	slices.SortFunc(all, func(a, b Image) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// Create gives target a new name; its annotations become the labels. AlreadyExists when the
// name is there, whatever it points at.
func (n *Names) Create(name string, target v1.Descriptor) (Image, error) {
	return n.put(name, target, func(*Image) error {
		return fmt.Errorf("image %s: %w", name, errdefs.ErrAlreadyExists)
	})
}

// Replace gives target the name, new or not. The time of creation stays, and so do labels that the
// target's annotations don't change.
func (n *Names) Replace(name string, target v1.Descriptor) (Image, error) {
	return n.put(name, target, func(old *Image) error {
		old.Target = target
		if old.Labels == nil {
			old.Labels = map[string]string{}
		}
		maps.Copy(old.Labels, target.Annotations)
		return nil
	})
}

// put makes the name, or lets exists change the image that has it.
func (n *Names) put(name string, target v1.Descriptor, exists func(*Image) error) (Image, error) {
	var img Image
	if err := checkName(name); err != nil {
		return img, err
	}
	if err := checkTarget(target); err != nil {
		return img, err
	}
	err := n.change(func(ix *index) error {
		now := time.Now().UTC()
		img = Image{Name: name, Target: target, Labels: target.Annotations, CreatedAt: now}
		at := ix.find(name)
		var err error
		if at >= 0 {
			if img, err = ix.entries[at].image(); err != nil {
				return err
			}
			if err := exists(&img); err != nil {
				return err
			}
		} else {
			at = len(ix.entries)
			ix.entries = append(ix.entries, entry{})
		}
		maps.DeleteFunc(img.Labels, func(k, v string) bool { return v == "" || reserved(k) })
		img.UpdatedAt = now
		ix.changed(img, img.CreatedAt.Equal(now))
		ix.entries[at], err = img.entry()
		return err
	})
	return img, err
}

// Update changes those fields of a name that the paths name, as containerd's image store does:
// "target", "labels" (all of them) or "labels.KEY" (set, or removed where img has it empty or
// not at all). NotFound when there is no such name, InvalidArgument for another path or none.
func (n *Names) Update(img Image, paths ...string) (Image, error) {
	var updated Image
	if len(paths) == 0 {
		return updated, errclass.Errorf(errdefs.ErrInvalidArgument, "update %s: no field is named", img.Name)
	}
	err := n.change(func(ix *index) error {
		at := ix.find(img.Name)
		if at < 0 {
			return fmt.Errorf("image %s: %w", img.Name, errdefs.ErrNotFound)
		}
		var err error
		if updated, err = ix.entries[at].image(); err != nil {
			return err
		}
		for _, path := range paths {
			if err := updated.set(img, path); err != nil {
				return fmt.Errorf("update %s: %w", img.Name, err)
			}
		}
		updated.UpdatedAt = time.Now().UTC()
		ix.changed(updated, false)
		ix.entries[at], err = updated.entry()
		return err
	})
	return updated, err
}

func (img *Image) set(from Image, path string) error {
	key, label := strings.CutPrefix(path, "labels.")
	switch {
	case path == "target":
		if err := checkTarget(from.Target); err != nil {
			return err
		}
		img.Target = from.Target
	case path == "labels":
		img.Labels = maps.Clone(from.Labels)
	case label && key != "" && !reserved(key):
		if img.Labels == nil {
			img.Labels = map[string]string{}
		}
		img.Labels[key] = from.Labels[key]
	default:
		return errclass.Errorf(errdefs.ErrInvalidArgument, "field %q: one of target, labels, labels.KEY", path)
	}
	maps.DeleteFunc(img.Labels, func(k, v string) bool { return v == "" || reserved(k) })
	return nil
}

func checkTarget(d v1.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "digest %.80q: %w", d.Digest, err)
	}
	return nil
}

// Delete takes the name away. NotFound when there is none.
func (n *Names) Delete(name string) error {
	return n.change(func(ix *index) error {
		at := ix.find(name)
		if at < 0 {
			return fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound)
		}
		ix.entries = slices.Delete(ix.entries, at, at+1)
		ix.events = append(ix.events, events.Event{Topic: "/images/delete", Name: name})
		return nil
	})
}

// index is an index.json of which everything that is not changed is written back as it was,
// fields unknown here included.
type index struct {
	fields  map[string]json.RawMessage
	entries []entry
	events  []events.Event // of the change, to be logged once it has happened
}

// changed notes that an image is made, or changed.
func (ix *index) changed(img Image, made bool) {
	e := events.Event{Topic: "/images/update", Name: img.Name, Digest: string(img.Target.Digest), Size: img.Target.Size, Labels: img.Labels}
	if made {
		e.Topic = "/images/create"
	}
	ix.events = append(ix.events, e)
}

// find returns where the name's entry is, or -1.
func (ix *index) find(name string) int {
	return slices.IndexFunc(ix.entries, func(e entry) bool { return e.name == name && name != "" })
}

type entry struct {
	raw  json.RawMessage
	name string
}

// parseEntry reads of an entry no more than its name. It is false where that is not text, or the
// entry no object.
func parseEntry(raw json.RawMessage) (e entry, ok bool) {
	e.raw = raw
	var annotations, name json.RawMessage
	ok = members(raw, func(key string, value json.RawMessage) {
		if key == "annotations" {
			annotations = value
		}
	})
	members(annotations, func(key string, value json.RawMessage) {
		if key == v1.AnnotationRefName {
			name = value
		}
	})
	return e, ok && (name == nil || json.Unmarshal(name, &e.name) == nil)
}

func (e entry) image() (Image, error) {
	var d v1.Descriptor
	if err := json.Unmarshal(e.raw, &d); err != nil {
		return Image{}, fmt.Errorf("read image %s: %w", e.name, err)
	}
	img := Image{Name: e.name, Target: d}
	img.Target.Annotations = nil
	for k, v := range d.Annotations {
		switch k {
		case v1.AnnotationRefName:
		case AnnotationCreated:
			img.CreatedAt, _ = time.Parse(time.RFC3339Nano, v)
		case AnnotationUpdated:
			img.UpdatedAt, _ = time.Parse(time.RFC3339Nano, v)
		default:
			if img.Labels == nil {
				img.Labels = map[string]string{}
			}
			img.Labels[k] = v
		}
	}
	return img, nil
}

func (img Image) entry() (entry, error) {
	d := img.Target
	d.Annotations = map[string]string{
		v1.AnnotationRefName: img.Name,
		AnnotationUpdated:    img.UpdatedAt.Format(time.RFC3339Nano),
	}
	if !img.CreatedAt.IsZero() {
		d.Annotations[AnnotationCreated] = img.CreatedAt.Format(time.RFC3339Nano)
	}
	for k, v := range img.Labels {
		if !reserved(k) {
			d.Annotations[k] = v
		}
	}
	raw, err := json.Marshal(d)
	if err != nil {
		return entry{}, fmt.Errorf("encode image %s: %w", img.Name, err)
	}
	return entry{raw, img.Name}, nil
}

// reserved are the annotations that are no labels.
func reserved(key string) bool {
	return key == v1.AnnotationRefName || key == AnnotationCreated || key == AnnotationUpdated
}

func (n *Names) path() string { return filepath.Join(n.layout.Root(), v1.ImageIndexFile) }

// read returns the names as they are now; none where there is no index.json yet.
func (n *Names) read() (*index, error) {
	b, err := os.ReadFile(n.path())
	if errors.Is(err, fs.ErrNotExist) {
		return &index{fields: map[string]json.RawMessage{}}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read names: %w", err)
	}
	return parseIndex(b, n.path())
}

func parseIndex(b []byte, path string) (*index, error) {
	damaged := func(format string, args ...any) (*index, error) {
		return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is not an OCI index: "+format, append([]any{path}, args...)...)
	}
	if !json.Valid(b) {
		return damaged("%w", json.Unmarshal(b, new(json.RawMessage)))
	}
	ix := &index{fields: map[string]json.RawMessage{}}
	if !members(b, func(key string, value json.RawMessage) { ix.fields[key] = value }) {
		return damaged("it is no object")
	}
	manifests := ix.fields["manifests"]
	if manifests == nil || string(manifests) == "null" {
		return ix, nil
	}
	strange := -1
	array := elements(manifests, func(value json.RawMessage) {
		e, ok := parseEntry(value)
		if !ok && strange < 0 {
			strange = len(ix.entries)
		}
		ix.entries = append(ix.entries, e)
	})
	if !array {
		return damaged("manifests is no array")
	}
	if strange >= 0 {
		return damaged("entry %d of its manifests is no descriptor", strange)
	}
	return ix, nil
}

// encode puts together what is valid JSON already, piece by piece: checking ten thousand names
// again would be most of the work of adding one.
func (ix *index) encode() ([]byte, error) {
	size := 64
	for _, e := range ix.entries {
		size += len(e.raw) + 1
	}
	b := make([]byte, 0, size)
	ix.fields["manifests"] = nil
	for i, key := range slices.Sorted(maps.Keys(ix.fields)) {
		quoted, err := json.Marshal(key)
		if err != nil {
			return nil, err
		}
		b = append(append(append(b, "{,"[min(i, 1)]), quoted...), ':')
		if key != "manifests" {
			b = append(b, ix.fields[key]...)
			continue
		}
		b = append(b, '[')
		for i, e := range ix.entries {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, e.raw...)
		}
		b = append(b, ']')
	}
	return append(b, "}\n"...), nil
}

// change locks index.json, lets f change what it says, and puts the new one in its place:
// written aside, synced, renamed, the directory synced (distkit-layout(5), index.json).
func (n *Names) change(f func(*index) error) error {
	lock, err := n.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	b, err := os.ReadFile(n.path())
	if err != nil {
		return fmt.Errorf("read names: %w", err)
	}
	ix, err := parseIndex(b, n.path())
	if err != nil {
		return err
	}
	if err := f(ix); err != nil {
		return err
	}
	if b, err = ix.encode(); err != nil {
		return fmt.Errorf("encode names: %w", err)
	}
	if err := disk.Replace(n.path(), b, 0o644, true); err != nil {
		return fmt.Errorf("write names: %w", err)
	}
	for _, e := range ix.events {
		e.Namespace = n.namespace
		if e.Name == "" {
			e.Name = n.namespace // a change of its labels
		}
		events.Append(n.root, e)
	}
	return nil
}

// lock locks index.json, which is made if it isn't there, and again if the namespace was
// removed while this waited for the lock.
func (n *Names) lock() (*os.File, error) {
	for {
		if err := n.create(); err != nil {
			return nil, err
		}
		f, err := disk.LockFile(n.path(), os.O_RDONLY, 0, unix.LOCK_EX)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("lock names: %w", err)
		}
		// A layout remembers that it is there: look anew.
		if n.layout, err = content.Open(n.layout.Root()); err != nil {
			return nil, err
		}
	}
}

// create makes the layout where it is missing. A namespace's shares the store's blobs and
// the place where files are written aside; it exists once it has an index.json.
func (n *Names) create() error {
	_, err := os.Stat(filepath.Join(n.layout.Root(), v1.ImageLayoutFile)) // which is made last
	if err == nil {
		_, err = os.Stat(n.path())
	}
	if err == nil {
		return nil
	}
	if n.layout.Root() == n.root {
		return n.layout.Init()
	}
	lock, err := lockNamespaces(n.root, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer lock.Close()
	made := true
	if err := os.Mkdir(n.layout.Root(), 0o755); errors.Is(err, fs.ErrExist) {
		made = false // by another who is about to fill it, or who died or had no room
	} else if err != nil {
		return fmt.Errorf("create namespace: %w", err)
	}
	for _, shared := range []string{v1.ImageBlobsDir, "ingest"} {
		if err := os.MkdirAll(filepath.Join(n.root, shared), 0o755); err != nil {
			return fmt.Errorf("create namespace: %w", err)
		}
		err := os.Symlink(filepath.Join("..", "..", shared), filepath.Join(n.layout.Root(), shared))
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("create namespace: %w", err)
		}
	}
	for _, dir := range []string{filepath.Dir(n.layout.Root()), n.root} {
		if err := disk.SyncDir(dir); err != nil {
			return fmt.Errorf("create namespace: %w", err)
		}
	}
	if err := n.layout.Init(); err != nil {
		return err
	}
	if made {
		events.Append(n.root, events.Event{Namespace: n.namespace, Topic: "/namespaces/create", Name: n.namespace})
	}
	return nil
}
