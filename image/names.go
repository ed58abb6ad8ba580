// Package image knows what a manifest, an index and a config say, and which names a store
// gives to them. Names are the entries of an OCI layout's index.json (image-spec v1.1,
// image-layout.md), changed under a lock by atomic rename.
package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// The annotations of a name's entry: when it was first made, and when it last changed.
const (
	AnnotationCreated = layout.AnnotationCreated
	AnnotationUpdated = layout.AnnotationUpdated
)

// DefaultNamespace is the namespace whose names stand in the store's own index.json.
const DefaultNamespace = layout.DefaultNamespace

// maxName and maxNamespace are bytes; the latter is containerd's limit on identifiers.
const (
	maxName      = 4096
	maxNamespace = 76
)

// Names are the names of one namespace of a store.
type Names struct {
	store     *content.Store
	namespace string
	dir       layout.Dir // that holds the names: the store, or a part of it
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

// OpenNames selects a namespace of the store. It touches nothing on disk. If the store was opened
// by the directory of a namespace, that is what the default namespace means, and every other one
// is InvalidArgument. A namespace that is no identifier is InvalidArgument, a layout version that
// is not known FailedPrecondition.
func OpenNames(store *content.Store, namespace string) (*Names, error) {
	namespace, err := layout.Within(store.Namespace(), namespace)
	if err != nil {
		return nil, err
	}
	return openNames(store, namespace)
}

// openNames is OpenNames, whatever the store was opened by.
func openNames(store *content.Store, namespace string) (*Names, error) {
	n := &Names{store, namespace, store.Dir}
	if namespace == DefaultNamespace {
		return n, nil
	}
	if !identifier(namespace) {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "namespace %.80q: letters, digits and single - . _ between them, %d at most",
			namespace, maxNamespace)
	}
	n.dir.Name = path.Join(layout.Namespaces, namespace)
	if err := n.dir.Check(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("namespace %s: %w", namespace, err)
	}
	return n, nil
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
	// It could not be told from the digest, which every command takes where it takes a name.
	if _, err := digest.Parse(name); err == nil {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "name %.80q is a digest", name)
	}
	return nil
}

// Get returns the image of that name. NotFound when there is none. Who looks up many names calls Read.
func (n *Names) Get(name string) (Image, error) {
	ix, err := n.read()
	if err != nil {
		return Image{}, err
	}
	return get(ix, name, ix.Find(name))
}

func get(ix *layout.Index, name string, at int) (Image, error) {
	if at < 0 {
		return Image{}, fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound)
	}
	return decode(ix.Entries[at])
}

// List returns all images, as [Listing.List] does.
func (n *Names) List() ([]Image, error) {
	l, err := n.Read()
	if err != nil {
		return nil, err
	}
	return l.List()
}

// Read returns the names as they are now. However many of them are looked up there, index.json is read once.
func (n *Names) Read() (*Listing, error) {
	ix, err := n.read()
	if err != nil {
		return nil, err
	}
	return &Listing{index: ix}, nil
}

// Listing is the names of a namespace at one instant.
type Listing struct {
	index *layout.Index
	at    positions // made by the first Get or Lookup
}

// Get returns the image of that name. NotFound when there is none.
func (l *Listing) Get(name string) (Image, error) {
	return get(l.index, name, l.find()(name))
}

// find returns a function that finds the first entry of a name.
func (l *Listing) find() func(name string) int {
	if l.at == nil {
		l.at = newPositions(l.index)
	}
	return l.at.find
}

// positions is where the first entry of each name is: for callers that look up many.
type positions map[string]int

func newPositions(ix *layout.Index) positions {
	at := make(positions, len(ix.Entries))
	for i, e := range ix.Entries {
		if _, twice := at[e.Name]; !twice && e.Name != "" {
			at[e.Name] = i
		}
	}
	return at
}

// find is [layout.Index.Find].
func (p positions) find(name string) int {
	if at, there := p[name]; there {
		return at
	}
	return -1
}

// List returns all images, sorted by name. If some entries of the index are no descriptors, the error is FailedPrecondition
// and describes the first of them, and the images are those of all other entries.
func (l *Listing) List() ([]Image, error) {
	all := make([]Image, 0, len(l.index.Entries))
	var strange error
	for img, err := range l.All() {
		if err == nil {
			all = append(all, img)
		}
		strange = cmp.Or(strange, err)
	}
	return all, strange
}

// All yields the images in the order of their names. For an entry that is no descriptor it yields an error, which is
// FailedPrecondition.
func (l *Listing) All() iter.Seq2[Image, error] {
	return func(yield func(Image, error) bool) {
		entries := l.index.Entries
		order := make([]int32, 0, len(entries))
		for i, e := range entries {
			if e.Name != "" || e.Malformed {
				order = append(order, int32(i))
			}
		}
		slices.SortFunc(order, func(a, b int32) int {
			if c := strings.Compare(entries[a].Name, entries[b].Name); c != 0 {
				return c
			}
			return cmp.Compare(a, b)
		})
		for _, i := range order {
			if !yield(decode(entries[i])) {
				return
			}
		}
	}
}

// Unnamed returns the entries of the index that have no name, in its order. Those that are no descriptors are passed over:
// List tells of them.
func (l *Listing) Unnamed() []Image {
	var all []Image
	for _, e := range l.index.Entries {
		if e.Name == "" && !e.Malformed {
			if img, err := decode(e); err == nil {
				all = append(all, img)
			}
		}
	}
	return all
}

// ContentLabels returns the labels that describe what the name points at, and not the name.
func (img Image) ContentLabels() map[string]string {
	labels := maps.Clone(img.Labels)
	maps.DeleteFunc(labels, func(k, _ string) bool { return !layout.DescribesContent(k) })
	return labels
}

// Create gives target a new name; its annotations become the labels. AlreadyExists when the
// name is there, whatever it points at.
func (n *Names) Create(ctx context.Context, name string, target v1.Descriptor) (Image, error) {
	return n.put(ctx, name, target, false)
}

// Replace gives target the name, new or not. The time of creation stays, and so do labels, as [layout.Index.Point] says.
func (n *Names) Replace(ctx context.Context, name string, target v1.Descriptor) (Image, error) {
	return n.put(ctx, name, target, true)
}

// ReplaceAll gives each image its name, new or not, as Replace does, all in one change: after an error none of
// them has it. Of the images given, only name, target and labels count.
func (n *Names) ReplaceAll(ctx context.Context, images []Image) error {
	for _, img := range images {
		if err := checkName(img.Name); err != nil {
			return err
		}
	}
	if len(images) == 0 {
		return nil
	}
	return n.change(ctx, func(ix *index) error {
		now := time.Now()
		all, given := newPositions(ix.Index), map[string]int{}
		for _, img := range images {
			target, err := n.settle(ctx, img.Target)
			if err != nil {
				return fmt.Errorf("name %s: %w", img.Name, err)
			}
			target.Annotations = img.Labels
			at := all.find(img.Name)
			if at < 0 {
				all[img.Name] = len(ix.Entries)
			}
			given[img.Name] = all[img.Name]
			labels, made, err := ix.PointAt(at, img.Name, target, now)
			if err != nil {
				return fmt.Errorf("name %s: %w", img.Name, err)
			}
			ix.changed(Image{Name: img.Name, Target: target, Labels: labels}, made)
		}
		i := -1
		ix.Entries = slices.DeleteFunc(ix.Entries, func(e layout.Entry) bool {
			i++
			at, there := given[e.Name]
			return there && at != i // another tool's further entry of the name
		})
		return nil
	})
}

// settle checks what a name is to point at, under the lock of the names, which no sweep shares: it is in the store, of that
// size, and an index, a manifest or another document that refers to blobs by descriptors. It returns the descriptor with
// the type that the document tells, where the one given tells none.
//
// NotFound: there is no such blob. DataLoss: it has another size. InvalidArgument: it is no such document, or of another type.
func (n *Names) settle(ctx context.Context, d v1.Descriptor) (v1.Descriptor, error) {
	is, err := Walker{Store: n.store}.Describe(ctx, d.Digest)
	if err != nil {
		return d, err
	}
	if d.Size != is.Size {
		return d, errclass.Errorf(errdefs.ErrDataLoss, "%s has %d bytes, the descriptor says %d", d.Digest, is.Size, d.Size)
	}
	if err := adopt(ctx, n.store, d); err != nil {
		return d, err
	}
	if is.MediaType == Octets {
		// If the document has no media type, the descriptor's counts, provided that the document refers to blobs.
		if d.MediaType != "" && d.MediaType != Octets && !IsIndex(d.MediaType) && !IsManifest(d.MediaType) {
			if b, err := (Walker{Store: n.store}).blob(d.Digest); err != nil || refers(b) {
				return d, err
			}
		}
		return d, errclass.Errorf(errdefs.ErrInvalidArgument, "%s is no manifest or index", d.Digest)
	}
	known := IsIndex(is.MediaType) || IsManifest(is.MediaType)
	if (IsIndex(d.MediaType) || IsManifest(d.MediaType)) && d.MediaType != is.MediaType {
		return d, errclass.Errorf(errdefs.ErrInvalidArgument, "%s is of type %.80q, its descriptor says %s", d.Digest, is.MediaType, d.MediaType)
	}
	if known || d.MediaType == "" || d.MediaType == Octets {
		d.MediaType = is.MediaType
	}
	return d, nil
}

// put makes the name. If it is there, it is replaced, or the error is AlreadyExists.
func (n *Names) put(ctx context.Context, name string, target v1.Descriptor, replace bool) (Image, error) {
	var img Image
	if err := checkName(name); err != nil {
		return img, err
	}
	err := n.change(ctx, func(ix *index) error {
		target, err := n.settle(ctx, target)
		if err != nil {
			return fmt.Errorf("name %s: %w", name, err)
		}
		if !replace && ix.Find(name) >= 0 {
			return fmt.Errorf("image %s: %w", name, errdefs.ErrAlreadyExists)
		}
		labels, made, err := ix.Point(name, target, time.Now())
		if err != nil {
			return err
		}
		ix.changed(Image{Name: name, Target: target, Labels: labels}, made)
		img, err = decode(ix.Entries[ix.Find(name)])
		return err
	})
	return img, err
}

// Update changes those fields of a name that the paths name, as containerd's image store does:
// "target", "labels" (all of them) or "labels.KEY" (set, or removed where img has it empty or
// not at all). If the target changes, labels that describe the content are removed. NotFound when there is no such name,
// InvalidArgument for another path or none.
func (n *Names) Update(ctx context.Context, img Image, paths ...string) (Image, error) {
	updated, errs, err := n.UpdateAll(ctx, []string{img.Name}, img, paths...)
	return updated[0], cmp.Or(err, errs[0])
}

// UpdateAll is Update of many names in one change. It returns, for each name, the image after the change, and an error:
// nil, or NotFound if there is no such name. If it returns an error for all of them, none is changed.
func (n *Names) UpdateAll(ctx context.Context, names []string, to Image, paths ...string) ([]Image, []error, error) {
	updated, errs := make([]Image, len(names)), make([]error, len(names))
	if len(paths) == 0 {
		return updated, errs, errclass.Errorf(errdefs.ErrInvalidArgument, "update %.80s: no field is named", strings.Join(names, " "))
	}
	err := n.changeExisting(ctx, func(ix *index) error {
		find := ix.Find
		if len(names) > 1 {
			find = newPositions(ix.Index).find
		}
		if slices.Contains(paths, "target") {
			var err error
			if to.Target, err = n.settle(ctx, to.Target); err != nil {
				return fmt.Errorf("update %.80s: %w", strings.Join(names, " "), err)
			}
		}
		for i, name := range names {
			at := spelled(find, name)
			if at < 0 {
				errs[i] = missing(find, name)
				continue
			}
			img, err := decode(ix.Entries[at])
			if err != nil {
				return err
			}
			for _, path := range paths {
				if err := img.set(to, path); err != nil {
					return fmt.Errorf("update %s: %w", name, err)
				}
			}
			img.UpdatedAt = time.Now().UTC()
			ix.changed(img, false)
			if ix.Entries[at], err = img.entry(); err != nil {
				return err
			}
			updated[i] = img
		}
		if len(ix.events) == 0 {
			return errUnchanged
		}
		return nil
	})
	return updated, errs, err
}

// Rename gives what a name points at another name, which may be in another namespace of the store, and takes the name away,
// with its labels and the time at which it was made. NotFound if there is no such name; AlreadyExists if the other is there,
// unless it is to be replaced. A crash between two namespaces leaves the image with both names; Rename then ends it.
func (n *Names) Rename(ctx context.Context, old string, to *Names, name string, replace bool) (Image, error) {
	var img Image
	if err := checkName(name); err != nil {
		return img, err
	}
	move := func(from, into *index) error {
		at := spelled(from.Find, old)
		if at < 0 {
			return missing(from.Find, old)
		}
		old := from.Entries[at].Name
		if from == into && old == name {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "rename %s: that is its name", old)
		}
		var err error
		if img, err = decode(from.Entries[at]); err != nil {
			return err
		}
		if there := into.Find(name); there >= 0 && !replace {
			// A move that was cut short between two namespaces is ended.
			is, err := decode(into.Entries[there])
			if err != nil || from == into || !is.isCopyOf(img) {
				return fmt.Errorf("image %s: %w", name, errdefs.ErrAlreadyExists)
			}
		}
		img.Name, img.UpdatedAt = name, time.Now().UTC()
		e, err := img.entry()
		if err != nil {
			return err
		}
		into.drop(name)
		into.Entries = append(into.Entries, e)
		into.changed(img, true)
		from.drop(old)
		from.events = append(from.events, events.Event{Topic: "/images/delete", Name: old})
		return nil
	}
	if n.namespace == to.namespace {
		return img, n.changeExisting(ctx, func(ix *index) error { return move(ix, ix) })
	}
	two, from := [2]*Names{n, to}, 0
	if to.namespace < n.namespace {
		two, from = [2]*Names{to, n}, 1
	}
	return img, changeTwo(ctx, two, 1-from, func(ix [2]*index) error { return move(ix[from], ix[1-from]) })
}

// isCopyOf reports whether two names point at the same, were made at the same time, and have the same labels.
func (img Image) isCopyOf(as Image) bool {
	return img.Target.Digest == as.Target.Digest && img.CreatedAt.Equal(as.CreatedAt) && maps.Equal(img.Labels, as.Labels)
}

// drop removes the entries of a name.
func (ix *index) drop(name string) {
	ix.Entries = slices.DeleteFunc(ix.Entries, func(e layout.Entry) bool { return e.Name == name })
}

func (img *Image) set(from Image, path string) error {
	key, label := strings.CutPrefix(path, "labels.")
	switch {
	case path == "target":
		if img.Target.Digest != from.Target.Digest {
			maps.DeleteFunc(img.Labels, func(k, _ string) bool { return layout.DescribesContent(k) })
		}
		img.Target = from.Target
	case path == "labels":
		img.Labels = maps.Clone(from.Labels)
	case label && key != "" && !layout.Reserved(key):
		if img.Labels == nil {
			img.Labels = map[string]string{}
		}
		img.Labels[key] = from.Labels[key]
	default:
		return errclass.Errorf(errdefs.ErrInvalidArgument, "field %q: one of target, labels, labels.KEY", path)
	}
	maps.DeleteFunc(img.Labels, func(k, v string) bool { return v == "" || layout.Reserved(k) })
	return nil
}

// Delete takes the name away. NotFound when there is none.
func (n *Names) Delete(ctx context.Context, name string) error {
	errs, err := n.DeleteAll(ctx, []string{name})
	return cmp.Or(err, errs[0])
}

// DeleteAll takes names away, all that are there in one change, each as [Names.Lookup] finds it. For each it returns what is wrong with
// it alone: nil, or NotFound. After an error, none is gone.
func (n *Names) DeleteAll(ctx context.Context, names []string) ([]error, error) {
	return n.remove(ctx, names, func(ix *layout.Index) func(string) string {
		find := newPositions(ix).find
		return func(name string) string {
			if at := spelled(find, name); at >= 0 {
				return ix.Entries[at].Name
			}
			return name
		}
	}, func(e layout.Entry) string { return e.Name },
		func(name string) events.Event { return events.Event{Name: name} },
		func(name string) error { return fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound) })
}

// DeleteUnnamed is DeleteAll for entries of the index that have no name, by the digests of what they point at.
func (n *Names) DeleteUnnamed(ctx context.Context, digests []string) ([]error, error) {
	digestOf := func(e layout.Entry) string {
		if e.Name != "" {
			return ""
		}
		d, _ := e.Descriptor()
		return string(d.Digest)
	}
	asGiven := func(*layout.Index) func(string) string { return func(dgst string) string { return dgst } }
	return n.remove(ctx, digests, asGiven, digestOf,
		func(dgst string) events.Event { return events.Event{Digest: dgst} },
		func(dgst string) error {
			return errclass.Errorf(errdefs.ErrNotFound, "no entry without a name points at %.80s", dgst)
		})
}

// remove removes the entries whose key is what actual makes of one of the keys given. It returns what missing says of each key that no entry has.
func (n *Names) remove(ctx context.Context, given []string, actual func(*layout.Index) func(key string) string, keyOf func(layout.Entry) string, event func(key string) events.Event, missing func(key string) error) ([]error, error) {
	errs := make([]error, len(given))
	err := n.changeExisting(ctx, func(ix *index) error {
		keys, of := make([]string, len(given)), actual(ix.Index)
		for i, key := range given {
			keys[i] = of(key)
		}
		there := make(map[string]bool, len(keys))
		for _, key := range keys {
			there[key] = false
		}
		ix.Entries = slices.DeleteFunc(ix.Entries, func(e layout.Entry) bool {
			key := keyOf(e)
			_, wanted := there[key]
			if wanted = wanted && key != ""; wanted {
				there[key] = true
			}
			return wanted
		})
		for i, key := range keys {
			if !there[key] {
				errs[i] = missing(key)
				continue
			}
			there[key] = false // a key that is given twice is gone the second time
			e := event(key)
			e.Topic = "/images/delete"
			ix.events = append(ix.events, e)
		}
		if len(ix.events) == 0 {
			return errUnchanged
		}
		return nil
	})
	return errs, err
}

// index is an index.json that is being changed.
type index struct {
	*layout.Index
	events []events.Event // of the change, to be logged once it has happened
}

// changed notes that an image is made, or changed.
func (ix *index) changed(img Image, made bool) {
	e := events.Event{Topic: "/images/update", Name: img.Name, Digest: string(img.Target.Digest), Size: img.Target.Size, Labels: img.Labels}
	if made {
		e.Topic = "/images/create"
	}
	ix.events = append(ix.events, e)
}

func decode(e layout.Entry) (Image, error) {
	img := Image{Name: e.Name}
	var err error
	img.Target, err = e.Target(func(key, value string) {
		switch key {
		case v1.AnnotationRefName, layout.AnnotationSubject, layout.AnnotationTag:
		case AnnotationCreated:
			img.CreatedAt, _ = time.Parse(time.RFC3339Nano, value)
		case AnnotationUpdated:
			img.UpdatedAt, _ = time.Parse(time.RFC3339Nano, value)
		default:
			if img.Labels == nil {
				img.Labels = map[string]string{}
			}
			img.Labels[key] = value
		}
	})
	if err != nil {
		return Image{}, fmt.Errorf("read image %s: %w", e.Name, err)
	}
	return img, nil
}

func (img Image) entry() (layout.Entry, error) {
	d := img.Target
	d.Annotations = map[string]string{
		v1.AnnotationRefName: img.Name,
		AnnotationUpdated:    img.UpdatedAt.Format(time.RFC3339Nano),
	}
	if !img.CreatedAt.IsZero() {
		d.Annotations[AnnotationCreated] = img.CreatedAt.Format(time.RFC3339Nano)
	}
	for k, v := range img.Labels {
		if !layout.Reserved(k) {
			d.Annotations[k] = v
		}
	}
	e, err := layout.NewEntry(d)
	if err != nil {
		return e, fmt.Errorf("encode image %s: %w", img.Name, err)
	}
	return e, nil
}

// read returns the names as they are now; none where there is no layout yet.
func (n *Names) read() (*layout.Index, error) { return n.dir.ReadIndex() }

// errUnchanged ends a change that changes nothing: nothing is written, and it is no error.
var errUnchanged = errors.New("nothing to change")

// change lets f change the names under the lock of index.json, and logs what it has changed.
func (n *Names) change(ctx context.Context, f func(*index) error) error {
	var ix *index
	err := n.dir.Change(ctx, func() error { return n.create(ctx) }, func(read *layout.Index) error {
		ix = &index{Index: read}
		return f(ix)
	})
	switch {
	case err == nil:
		n.log(ix)
	case errors.Is(err, errUnchanged):
		return nil
	}
	return err
}

// changeExisting is change for names that must exist: it does not create a store or a namespace that is missing, but calls f with
// no names and changes nothing.
func (n *Names) changeExisting(ctx context.Context, f func(*index) error) error {
	there, err := n.dir.Exists()
	if err == nil && !there {
		if err = f(&index{Index: &layout.Index{}}); errors.Is(err, errUnchanged) {
			err = nil
		}
		return err
	}
	if err != nil {
		return err
	}
	return n.change(ctx, f)
}

// changeTwo is change of two namespaces, in the order of their names.
func changeTwo(ctx context.Context, two [2]*Names, before int, f func([2]*index) error) error {
	var ix [2]*index
	create := func() error { return cmp.Or(two[0].create(ctx), two[1].create(ctx)) }
	err := layout.ChangeTwo(ctx, [2]layout.Dir{two[0].dir, two[1].dir}, before, create, func(read [2]*layout.Index) error {
		ix = [2]*index{{Index: read[0]}, {Index: read[1]}}
		return f(ix)
	})
	if err == nil {
		two[before].log(ix[before])
		two[1-before].log(ix[1-before])
	}
	return err
}

func (n *Names) log(ix *index) {
	for i := range ix.events {
		ix.events[i].Namespace = n.namespace
	}
	events.Append(n.store.Root(), ix.events...)
}

// create makes the layout where it is missing. A namespace's shares the store's blobs and
// the place where files are written aside; it exists once it has an index.json.
func (n *Names) create(ctx context.Context) error {
	if n.dir.Name == "." {
		return n.store.Init()
	}
	if there, err := n.dir.Exists(); there || err != nil {
		return err
	}
	if err := n.store.Init(); err != nil {
		return err
	}
	lock, err := lockNamespaces(ctx, n.store, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer disk.Release(lock)
	made, err := n.make(nil)
	if made {
		n.logMade(nil)
	}
	return err
}

func (n *Names) logMade(labels map[string]string) {
	events.Append(n.store.Root(), events.Event{Namespace: n.namespace, Topic: "/namespaces/create", Name: n.namespace, Labels: labels})
}

// blobsOfStore is what a namespace's blobs are a symbolic link to.
const blobsOfStore = "../../" + v1.ImageBlobsDir

// make creates the namespace's directory and files. made is false if the directory was there: another process is about to
// fill it, or has died. The labels are those of a namespace that does not exist, as a caller knows who holds the lock of
// all namespaces alone.
func (n *Names) make(labels map[string]string) (made bool, err error) {
	tree := n.dir.Tree
	made = true
	if err = tree.MakeDir(layout.Namespaces); err == nil {
		err = tree.Mkdir(n.dir.Name, 0o777)
	}
	if errors.Is(err, fs.ErrExist) {
		made, err = false, nil
	}
	blobs := n.dir.File(v1.ImageBlobsDir)
	if err == nil {
		err = tree.Symlink(blobsOfStore, blobs)
	}
	if err == nil || errors.Is(err, fs.ErrExist) {
		if target, rerr := tree.Readlink(blobs); rerr != nil || target != blobsOfStore {
			return false, errclass.Errorf(errdefs.ErrFailedPrecondition, "create namespace %s: %s is no symbolic link to %s", n.namespace, tree.Path(blobs), blobsOfStore)
		}
		err = nil
	}
	for _, dir := range []string{layout.Namespaces, "."} {
		if err == nil {
			err = tree.SyncDir(dir)
		}
	}
	if err == nil && len(labels) > 0 {
		err = n.dir.WriteEmptyIndex(labels)
	}
	if err == nil {
		err = n.dir.Create(layout.Ingest)
	}
	if err != nil {
		return false, fmt.Errorf("create namespace %s: %w", n.namespace, err)
	}
	return made, nil
}
