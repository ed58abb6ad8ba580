// Package image has the names and the structure of images in a content store.
//
// [OpenNames] selects the [Names] of a namespace, which are entries of an OCI layout's index.json (image-spec v1.1,
// image-layout.md): Get and Read look names up, Create, Update and Delete change them under a lock, by atomic rename.
// [Namespaces] creates and removes namespaces.
//
// A [Walker] follows descriptors through the blobs of the store: Walk visits everything that an image refers to,
// Manifest, Config and Layers return the parts for a platform, Missing returns the blobs that are not stored. Its
// limits bound the depth, number and size of documents. [Part] replaces one document of an image, and Convert turns
// Docker's media types into OCI's.
//
// [Sweep] deletes the blobs that no name, container or label reaches; Explain says why one is kept.
//
// Documents are untrusted: each is hashed when it is read, and bounded before it is decoded. Errors have classes of
// github.com/containerd/errdefs: NotFound, AlreadyExists, InvalidArgument (a malformed name or document), DataLoss (a
// document or size that doesn't verify), FailedPrecondition (a damaged index.json, a namespace that is not empty),
// Unavailable (a store or lock that is busy).
//
// Packages below this one: copygraph copies images, transfer imports and exports archives, serve is a registry, look
// lists and reads files of layers.
package image

import (
	"cmp"
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
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// The annotations with the times at which a name was created and last changed.
const (
	AnnotationCreated = layout.AnnotationCreated
	AnnotationUpdated = layout.AnnotationUpdated
)

// DefaultNamespace is the namespace whose names are in the store's own index.json.
const DefaultNamespace = layout.DefaultNamespace

// Maximum lengths in bytes. That of a namespace is containerd's for identifiers.
const (
	maxName      = 4096
	maxNamespace = 76
)

// Names are the names in one namespace of a store.
type Names struct {
	store     *content.Store
	namespace string
	dir       layout.Dir // has the index.json: the store itself, or a namespace in it
}

// Image is a name and what it points at. Name is "" for an image selected by digest.
type Image struct {
	Name      string
	Target    v1.Descriptor // without the annotations for the name and its times
	Labels    map[string]string
	CreatedAt time.Time // zero if another tool wrote the entry
	UpdatedAt time.Time
}

// Field returns a field for containerd's filters: name, target.digest, target.mediatype or labels.KEY.
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

// OpenNames selects a namespace of the store. It accesses nothing on disk but the namespace's version. If the store was
// opened by the directory of a namespace, the default namespace means that one, and any other is InvalidArgument.
// InvalidArgument: the namespace is not an identifier. FailedPrecondition: unknown layout version.
func OpenNames(store *content.Store, namespace string) (*Names, error) {
	namespace, err := layout.Within(store.Namespace(), namespace)
	if err != nil {
		return nil, err
	}
	return openNames(store, namespace)
}

// openNames is OpenNames without regard to how the store was opened.
func openNames(store *content.Store, namespace string) (*Names, error) {
	n := &Names{store, namespace, store.Dir}
	if namespace == DefaultNamespace {
		return n, nil
	}
	if !identifier(namespace) {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "namespace %.80q: must be letters and digits with single - . _ between them, at most %d characters",
			namespace, maxNamespace)
	}
	n.dir.Name = path.Join(layout.Namespaces, namespace)
	if err := n.dir.Check(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("namespace %s: %w", namespace, err)
	}
	return n, nil
}

// identifier implements the rule of containerd's pkg/identifiers.
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
		return errclass.Errorf(errdefs.ErrInvalidArgument, "name %.80q: must be printable text without spaces, at most %d bytes",
			name, maxName)
	}
	// Such a name would be taken for the digest, since every command accepts both.
	if _, err := digest.Parse(name); err == nil {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "name %.80q is a digest", name)
	}
	return nil
}

// Get returns the image with a name. NotFound if it doesn't exist. To look up many names, use Read.
func (n *Names) Get(name string) (Image, error) {
	ix, err := n.read()
	if err != nil {
		return Image{}, err
	}
	return get(ix, name, ix.Find(name))
}

func get(ix *layout.Index, name string, i int) (Image, error) {
	if i < 0 {
		return Image{}, fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound)
	}
	return decode(ix.Entries[i])
}

// List returns all images, as [Listing.List] does.
func (n *Names) List() ([]Image, error) {
	l, err := n.Read()
	if err != nil {
		return nil, err
	}
	return l.List()
}

// Read returns the current names. index.json is read once, however many of them are looked up.
func (n *Names) Read() (*Listing, error) {
	ix, err := n.read()
	if err != nil {
		return nil, err
	}
	return &Listing{index: ix}, nil
}

// Listing has the names of a namespace at one moment.
type Listing struct {
	index     *layout.Index
	positions positions // made by the first Get or Lookup
}

// Get returns the image with a name. NotFound if it doesn't exist.
func (l *Listing) Get(name string) (Image, error) {
	return get(l.index, name, l.find()(name))
}

// find returns a function that finds the first entry of a name.
func (l *Listing) find() func(name string) int {
	if l.positions == nil {
		l.positions = newPositions(l.index)
	}
	return l.positions.find
}

// positions maps each name to the position of its first entry.
type positions map[string]int

func newPositions(ix *layout.Index) positions {
	p := make(positions, len(ix.Entries))
	for i, e := range ix.Entries {
		if _, twice := p[e.Name]; !twice && e.Name != "" {
			p[e.Name] = i
		}
	}
	return p
}

// find is [layout.Index.Find] without a search.
func (p positions) find(name string) int {
	if i, ok := p[name]; ok {
		return i
	}
	return -1
}

// List returns all images, sorted by name. If an entry is not a descriptor, List returns the images of all other
// entries and a FailedPrecondition error for the first such entry.
func (l *Listing) List() ([]Image, error) {
	all := make([]Image, 0, len(l.index.Entries))
	var malformed error
	for img, err := range l.All() {
		if err == nil {
			all = append(all, img)
		}
		malformed = cmp.Or(malformed, err)
	}
	return all, malformed
}

// All yields the images, sorted by name. For an entry that is not a descriptor it yields a FailedPrecondition error.
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

// Unnamed returns the entries without a name, in the order of the index. It skips entries that are not descriptors,
// which List reports.
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

// ContentLabels returns the labels that describe the content rather than the name.
func (img Image) ContentLabels() map[string]string {
	labels := maps.Clone(img.Labels)
	maps.DeleteFunc(labels, func(k, _ string) bool { return !layout.DescribesContent(k) })
	return labels
}
