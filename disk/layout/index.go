package layout

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
	"unsafe"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Bounds of an index.json: its size in bytes, the number of its entries, and that of its other members. 25,000 names
// take about 8 MiB.
const (
	maxIndex   = 128 << 20
	maxEntries = 1 << 20
	maxFields  = 1 << 10
)

// Index is a parsed index.json. Whatever isn't changed is written back byte for byte, including fields unknown here.
type Index struct {
	Fields  map[string]json.RawMessage // every member but "manifests"
	Entries []Entry
	text    []byte // the file's content; Entry.Raw and Entry.Name of parsed entries point into it
}

// Entry is one descriptor of an index.
type Entry struct {
	Raw    json.RawMessage
	Name   string // the annotation org.opencontainers.image.ref.name; "" if it has none
	offset int    // of Raw in Index.text; 0 for a new entry

	Malformed bool // not an object, or the name is not a string: Descriptor fails, and Name is ""
}

// CheckLabels returns InvalidArgument for labels that are not UTF-8: encoding/json would silently replace such bytes.
func CheckLabels(labels map[string]string) error {
	for k, v := range labels {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "label %.40q: key or value is not UTF-8", k)
		}
	}
	return nil
}

// NewEntry encodes a descriptor. Its name is among the descriptor's annotations. InvalidArgument if an annotation is
// not UTF-8.
func NewEntry(d v1.Descriptor) (Entry, error) {
	if err := CheckLabels(d.Annotations); err != nil {
		return Entry{}, err
	}
	raw, err := json.Marshal(d)
	return Entry{Raw: raw, Name: d.Annotations[v1.AnnotationRefName]}, err
}

// Descriptor decodes the entry. FailedPrecondition if it is no descriptor.
func (e Entry) Descriptor() (v1.Descriptor, error) {
	var all map[string]string
	d, err := e.Target(func(key, value string) {
		if all == nil {
			all = map[string]string{}
		}
		all[key] = value
	})
	d.Annotations = all
	return d, err
}

// Target is Descriptor without the annotations: it calls f with each of them instead. If f is called twice with the
// same key, the last value counts.
func (e Entry) Target(f func(key, value string)) (v1.Descriptor, error) {
	if d, ok := e.plain(f); ok {
		return d, nil
	}
	var d v1.Descriptor
	if err := json.Unmarshal(e.Raw, &d); err != nil {
		return d, errclass.Errorf(errdefs.ErrFailedPrecondition, "entry %.80q of %s is no descriptor: %w", e.Name, v1.ImageIndexFile, err)
	}
	for k, v := range d.Annotations {
		f(k, v)
	}
	d.Annotations = nil
	return d, nil
}

// plain is Target for a descriptor whose members are exactly those of this package's own entries, each at most once.
// For any other entry ok is false. encoding/json takes ten times as long.
func (e Entry) plain(f func(key, value string)) (d v1.Descriptor, ok bool) {
	s := scanner{b: e.Raw}
	text := func() string {
		if v := s.value(); len(v) > 0 && v[0] == '"' {
			return share(v)
		}
		s.bad = true // null, a number, …: left to encoding/json
		return ""
	}
	if !s.enter('{') {
		return d, false
	}
	annotated := false
	for s.more('}') {
		switch key := s.key(); {
		case is(key, "mediaType") && d.MediaType == "":
			d.MediaType = text()
		case is(key, "digest") && d.Digest == "":
			d.Digest = digest.Digest(text())
		case is(key, "size") && d.Size == 0:
			n, err := strconv.ParseInt(string(s.value()), 10, 64)
			d.Size, s.bad = n, s.bad || err != nil
		case is(key, "annotations") && !annotated && s.enter('{'):
			for annotated = true; s.more('}'); {
				key := s.key()
				if value := text(); !s.bad {
					f(share(key), value)
				}
			}
		default:
			s.bad = true
		}
	}
	return d, s.end()
}

// entry reads the next value as an entry. It decodes nothing but the name.
func (s *scanner) entry() Entry {
	s.peek()
	e := Entry{offset: s.i}
	if !s.enter('{') {
		e.Raw, e.Malformed = s.value(), true
		return e
	}
	var name []byte
	for s.more('}') {
		if !is(s.key(), "annotations") || !s.enter('{') {
			s.value()
			continue
		}
		for s.more('}') {
			if key := s.key(); is(key, v1.AnnotationRefName) {
				name = s.value()
			} else {
				s.value()
			}
		}
	}
	if !s.bad {
		e.Raw = s.b[e.offset:s.i]
		if len(name) > 0 && name[0] == '"' {
			e.Name = share(name)
		} else if name != nil && string(name) != "null" {
			e.Malformed = true
		}
	}
	return e
}

// share is unquote without a copy where possible: a string without escapes shares the memory of the index's text, which
// is never modified. Of a hundred thousand names a caller mostly wants one.
func share(quoted []byte) string {
	if text := quoted[1 : len(quoted)-1]; len(text) > 0 && bytes.IndexByte(text, '\\') < 0 && utf8.Valid(text) {
		return unsafe.String(&text[0], len(text))
	}
	return unquote(quoted)
}

// is reports whether a quoted JSON string has the given text, which must be ASCII.
func is(quoted []byte, text string) bool {
	if len(quoted) <= len(text)+2 { // with escapes it would be longer
		return len(quoted) == len(text)+2 && string(quoted[1:len(quoted)-1]) == text
	}
	return bytes.IndexByte(quoted, '\\') >= 0 && unquote(quoted) == text
}

// Find returns the position of the entry with the given name, or -1.
func (ix *Index) Find(name string) int {
	return slices.IndexFunc(ix.Entries, func(e Entry) bool { return e.Name == name && name != "" })
}

// Annotations of a named entry: when the name was created, and when it last changed (RFC 3339, UTC).
const (
	AnnotationCreated = "distkit.created"
	AnnotationUpdated = "distkit.updated"
)

// Reserved reports whether an annotation of an entry is one of the layout's own, and so not a label.
func Reserved(key string) bool {
	switch key {
	case v1.AnnotationRefName, AnnotationCreated, AnnotationUpdated, AnnotationSubject, AnnotationTag:
		return true
	}
	return false
}

// DescribesContent reports whether a label describes the image that a name points at rather than the name itself. This
// is so for image-spec's annotations, such as the version, and for [LabelSource].
func DescribesContent(label string) bool {
	return strings.HasPrefix(label, "org.opencontainers.") || strings.HasPrefix(label, LabelSource)
}

// LabelSource, followed by a registry's host, is a label that lists repositories of that registry which are known to
// have an image or a blob, separated by commas. containerd sets it on blobs. The registry can be asked to mount a blob
// from one of them into another repository.
const LabelSource = "containerd.io/distribution.source."

// Point makes name point at target, and creates the name if it doesn't exist (made). It returns the name's labels.
//
// Labels are set from target's annotations; an empty value removes the label. A label that the name has already stays,
// with one exception: if target's digest is not the current one, labels that describe content go. The creation time
// stays. Further entries with the same name are removed.
func (ix *Index) Point(name string, target v1.Descriptor, now time.Time) (labels map[string]string, made bool, err error) {
	at := ix.Find(name)
	if labels, made, err = ix.PointAt(at, name, target, now); err != nil || made {
		return labels, made, err
	}
	rest := slices.DeleteFunc(ix.Entries[at+1:], func(e Entry) bool { return e.Name == name })
	ix.Entries = ix.Entries[:at+1+len(rest)]
	return labels, made, nil
}

// PointAt is Point for a caller that knows the position of the name's entry, -1 if there is none. It keeps further
// entries with the same name.
func (ix *Index) PointAt(position int, name string, target v1.Descriptor, now time.Time) (labels map[string]string, made bool, err error) {
	stamp := now.UTC().Format(time.RFC3339Nano)
	labels = map[string]string{}
	all := map[string]string{v1.AnnotationRefName: name, AnnotationUpdated: stamp}
	if made = position < 0; made {
		all[AnnotationCreated] = stamp
	} else {
		old, err := ix.Entries[position].Descriptor()
		if err != nil {
			return nil, false, err
		}
		for k, v := range old.Annotations {
			if k == AnnotationCreated {
				all[k] = v
			} else if !DescribesContent(k) || old.Digest == target.Digest {
				labels[k] = v
			}
		}
	}
	maps.Copy(labels, target.Annotations)
	maps.DeleteFunc(labels, func(k, v string) bool { return v == "" || Reserved(k) })
	maps.Copy(all, labels)
	target.Annotations = all
	e, err := NewEntry(target)
	switch {
	case err != nil:
		return nil, false, err
	case made:
		ix.Entries = append(ix.Entries, e)
	default:
		ix.Entries[position] = e
	}
	return labels, made, nil
}

// ReadIndex returns the current index. It is empty if the layout doesn't exist yet. FailedPrecondition if the layout
// exists but its index.json is missing or damaged.
func (d Dir) ReadIndex() (*Index, error) {
	for range indexTries {
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
			return &Index{Fields: map[string]json.RawMessage{}}, nil
		}
	}
	return nil, d.gone()
}

// parse reads an index.json in one pass, because a hundred thousand names take 35 MB.
func (d Dir) parse(b []byte) (*Index, error) {
	damaged := func(format string, args ...any) (*Index, error) {
		return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is not an OCI index: "+format, append([]any{d.Path(v1.ImageIndexFile)}, args...)...)
	}
	ix := &Index{Fields: map[string]json.RawMessage{}, text: b}
	s := &scanner{b: b}
	object, array, n := s.enter('{'), true, 0
	if !object {
		s.value()
	}
	for object && s.more('}') {
		key := s.key()
		switch {
		case !is(key, "manifests"):
			value := s.value()
			if !s.bad && len(ix.Fields) <= maxFields {
				ix.Fields[unquote(key)] = value
			}
		case s.enter('['):
			array, ix.Entries = true, make([]Entry, 0, min(len(b)/256, maxEntries))
			for n = 0; s.more(']'); n++ {
				if e := s.entry(); n < maxEntries {
					ix.Entries = append(ix.Entries, e)
				}
			}
		default:
			array = string(s.value()) == "null"
			ix.Entries, n = nil, 0
		}
	}
	switch {
	case !s.end():
		return damaged("%w", json.Unmarshal(b, new(json.RawMessage)))
	case !object:
		return damaged("not an object")
	case len(ix.Fields) > maxFields:
		return damaged("it has more than %d members", maxFields)
	case !array:
		return damaged("manifests is not an array")
	case n > maxEntries:
		return damaged("it has more than %d manifests", maxEntries)
	}
	return ix, nil
}

// write writes the index. Entries that are adjacent in the text that was parsed are written in one call.
func (ix *Index) write(to io.Writer) (n int, err error) {
	w := bufio.NewWriterSize(to, 64<<10)
	put := func(b []byte) {
		if err == nil {
			_, err = w.Write(b)
			n += len(b)
		}
	}
	for i, key := range slices.Sorted(maps.Keys(withManifests(ix.Fields))) {
		quoted, err := json.Marshal(key)
		if err != nil {
			return n, err
		}
		put([]byte("{,"[min(i, 1):][:1]))
		put(quoted)
		put([]byte{':'})
		if key != "manifests" {
			put(ix.Fields[key])
			continue
		}
		put([]byte{'['})
		for i := 0; i < len(ix.Entries); {
			if i > 0 {
				put([]byte{','})
			}
			var run []byte
			run, i = ix.run(i)
			put(run)
		}
		put([]byte{']'})
	}
	put([]byte("}\n"))
	if err == nil {
		err = w.Flush()
	}
	return n, err
}

// run returns the text of entry i together with the entries after it that are adjacent in the parsed text, and the
// position after them. A new entry is returned alone.
func (ix *Index) run(i int) (text []byte, next int) {
	first := ix.Entries[i]
	end := first.offset + len(first.Raw)
	for next = i + 1; first.offset > 0 && next < len(ix.Entries); next++ {
		e := ix.Entries[next]
		if e.offset < end || !separates(ix.text[end:e.offset]) {
			break
		}
		end = e.offset + len(e.Raw)
	}
	if next == i+1 {
		return first.Raw, next
	}
	return ix.text[first.offset:end], next
}

// separates reports whether the text between two entries has no other entry.
func separates(between []byte) bool {
	for _, c := range between {
		if c != ',' && c != ' ' && c != '\t' && c != '\r' && c != '\n' {
			return false
		}
	}
	return true
}

func withManifests(fields map[string]json.RawMessage) map[string]json.RawMessage {
	all := maps.Clone(fields)
	all["manifests"] = nil
	return all
}

// Change locks index.json, calls f to modify the index, and replaces the file durably (distkit-layout(5), NAMES). It
// calls create first, which must create the layout if it doesn't exist. It calls create again if the layout was removed
// while it waited for the lock. A sweep may hold the lock for minutes; Change waits until ctx is done.
func (d Dir) Change(ctx context.Context, create func() error, f func(*Index) error) error {
	return changeAll(ctx, []Dir{d}, 0, create, func(all []*Index) error { return f(all[0]) })
}

// ChangeTwo is Change for two layouts under both locks. The caller passes them in the order of their namespaces' names,
// since two processes that lock in different orders would wait for each other forever. The layout at position first, 0
// or 1, is replaced before the other one.
func ChangeTwo(ctx context.Context, two [2]Dir, first int, create func() error, f func(two [2]*Index) error) error {
	return changeAll(ctx, two[:], first, create, func(all []*Index) error { return f([2]*Index(all)) })
}

func changeAll(ctx context.Context, dirs []Dir, first int, create func() error, f func([]*Index) error) error {
	locks, err := lockIndexes(ctx, dirs, create)
	if err != nil {
		return err
	}
	defer releaseAll(locks)
	all := make([]*Index, len(dirs))
	for i, d := range dirs {
		b, err := disk.ReadAll(locks[i], maxIndex)
		if err != nil {
			return fmt.Errorf("read names: %s: %w", d.Path(v1.ImageIndexFile), err)
		}
		if all[i], err = d.parse(b); err != nil {
			return err
		}
	}
	if err := f(all); err != nil {
		return err
	}
	for i := range dirs {
		i = (i + first) % len(dirs)
		if err := dirs[i].replace(all[i]); err != nil {
			return err
		}
	}
	return nil
}

func releaseAll(locks []*os.File) {
	for _, f := range locks {
		disk.Release(f)
	}
}

func (d Dir) replace(ix *Index) error {
	err := d.Tree.ReplaceBy(d.File(v1.ImageIndexFile), 0o666, true, func(f *os.File) error {
		n, err := ix.write(f)
		if err == nil && (n > maxIndex || len(ix.Entries) > maxEntries) {
			return errclass.Errorf(errdefs.ErrFailedPrecondition, "too many names: %s would have %d entries and %d bytes",
				d.Path(v1.ImageIndexFile), len(ix.Entries), n)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("write names: %w", err)
	}
	return nil
}

// WriteEmptyIndex replaces index.json with one that has the given annotations and no names.
func (d Dir) WriteEmptyIndex(annotations map[string]string) error {
	if err := CheckLabels(annotations); err != nil {
		return err
	}
	all, err := json.Marshal(annotations)
	if err != nil {
		return err
	}
	ix, err := d.parse([]byte(emptyIndex))
	if err != nil {
		return err
	}
	ix.Fields["annotations"] = all
	return d.replace(ix)
}

// lockTries is how often lockIndexes creates the layout again because another process removed it.
const lockTries = 100

func lockIndexes(ctx context.Context, dirs []Dir, create func() error) ([]*os.File, error) {
	for n := 1; ; n++ {
		if err := create(); err != nil {
			return nil, err
		}
		var locks []*os.File
		var err error
		for _, d := range dirs {
			var f *os.File
			if f, err = d.LockIndex(ctx, unix.LOCK_EX); err != nil {
				break
			}
			locks = append(locks, f)
		}
		if err == nil {
			return locks, nil
		}
		releaseAll(locks)
		if !errors.Is(err, fs.ErrNotExist) || n == lockTries {
			return nil, fmt.Errorf("lock names: %w", err)
		}
	}
}
