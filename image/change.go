package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"
)

// Create creates a name for target; the annotations of target become labels. AlreadyExists if the name exists, whatever
// it points at.
func (n *Names) Create(ctx context.Context, name string, target v1.Descriptor) (Image, error) {
	return n.put(ctx, name, target, false)
}

// Replace makes a name point at target, and creates the name if it doesn't exist. The creation time stays; labels
// change as [layout.Index.Point] says.
func (n *Names) Replace(ctx context.Context, name string, target v1.Descriptor) (Image, error) {
	return n.put(ctx, name, target, true)
}

// ReplaceAll is Replace for many images in one change: after an error none is changed. It uses name, target and labels
// of each image.
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
			i := all.find(img.Name)
			if i < 0 {
				all[img.Name] = len(ix.Entries)
			}
			given[img.Name] = all[img.Name]
			labels, made, err := ix.PointAt(i, img.Name, target, now)
			if err != nil {
				return fmt.Errorf("name %s: %w", img.Name, err)
			}
			ix.changed(Image{Name: img.Name, Target: target, Labels: labels}, made)
		}
		i := -1
		ix.Entries = slices.DeleteFunc(ix.Entries, func(e layout.Entry) bool {
			i++
			keep, ok := given[e.Name]
			return ok && keep != i // a further entry of the name, by another tool
		})
		return nil
	})
}

// settle checks the target of a name under the lock of the names, which excludes sweeps. The blob must be stored, have
// the descriptor's size, and be an index, a manifest or another document that refers to blobs by descriptors. It
// returns the descriptor, with the document's own media type if the descriptor had none.
//
// NotFound: the blob isn't stored. DataLoss: another size. InvalidArgument: another kind of blob or another type.
func (n *Names) settle(ctx context.Context, d v1.Descriptor) (v1.Descriptor, error) {
	stored, err := Walker{Store: n.store}.Describe(ctx, d.Digest)
	if err != nil {
		return d, err
	}
	if d.Size != stored.Size {
		return d, errclass.Errorf(errdefs.ErrDataLoss, "%s has %d bytes, the descriptor says %d", d.Digest, stored.Size, d.Size)
	}
	if err := adopt(ctx, n.store, d); err != nil {
		return d, err
	}
	if stored.MediaType == Octets {
		// If the document has no media type, the descriptor's counts, provided that the document refers to blobs.
		if d.MediaType != "" && d.MediaType != Octets && !IsIndex(d.MediaType) && !IsManifest(d.MediaType) {
			if b, err := (Walker{Store: n.store}).blob(d.Digest); err != nil || refers(b) {
				return d, err
			}
		}
		return d, errclass.Errorf(errdefs.ErrInvalidArgument, "%s is not a manifest or index", d.Digest)
	}
	known := IsIndex(stored.MediaType) || IsManifest(stored.MediaType)
	if (IsIndex(d.MediaType) || IsManifest(d.MediaType)) && d.MediaType != stored.MediaType {
		return d, errclass.Errorf(errdefs.ErrInvalidArgument, "%s is of type %.80q, its descriptor says %s", d.Digest, stored.MediaType, d.MediaType)
	}
	if known || d.MediaType == "" || d.MediaType == Octets {
		d.MediaType = stored.MediaType
	}
	return d, nil
}

// put makes a name point at target. If the name exists it is changed with replace, or else the error is AlreadyExists.
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

// Update changes the fields of a name that the paths list, as containerd's image store does: "target", "labels" (all of
// them) or "labels.KEY" (set, or removed if img has it empty or not at all). If the target changes, labels that
// describe the content are removed. NotFound if the name doesn't exist, InvalidArgument for another path or none.
func (n *Names) Update(ctx context.Context, img Image, paths ...string) (Image, error) {
	updated, errs, err := n.UpdateAll(ctx, []string{img.Name}, img, paths...)
	return updated[0], cmp.Or(err, errs[0])
}

// UpdateAll is Update for many names in one change. For each name it returns the image after the change, and nil or
// NotFound. If it returns an error for all of them, none is changed.
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
			pos := findSpelling(find, name)
			if pos < 0 {
				errs[i] = missing(find, name)
				continue
			}
			img, err := decode(ix.Entries[pos])
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
			if ix.Entries[pos], err = img.entry(); err != nil {
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

// Rename moves an image to another name, possibly in another namespace of the store, with its labels and creation time.
// NotFound if the old name doesn't exist; AlreadyExists if the new one does, unless replace is set. After a crash
// between two namespaces the image may have both names; calling Rename again completes the move.
func (n *Names) Rename(ctx context.Context, old string, to *Names, name string, replace bool) (Image, error) {
	var img Image
	if err := checkName(name); err != nil {
		return img, err
	}
	move := func(from, into *index) error {
		i := findSpelling(from.Find, old)
		if i < 0 {
			return missing(from.Find, old)
		}
		old := from.Entries[i].Name
		if from == into && old == name {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "rename %s: that is its name", old)
		}
		var err error
		if img, err = decode(from.Entries[i]); err != nil {
			return err
		}
		if j := into.Find(name); j >= 0 && !replace {
			// Accept the copy that an interrupted move between two namespaces left.
			existing, err := decode(into.Entries[j])
			if err != nil || from == into || !existing.isCopyOf(img) {
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
	ix, err := n.read()
	if err == nil && findSpelling(ix.Find, old) < 0 {
		err = missing(ix.Find, old)
	}
	if err != nil {
		return img, err // and neither namespace is made
	}
	return img, changeTwo(ctx, two, 1-from, func(ix [2]*index) error { return move(ix[from], ix[1-from]) })
}

// isCopyOf reports whether two images have the same target, creation time and labels.
func (img Image) isCopyOf(other Image) bool {
	return img.Target.Digest == other.Target.Digest && img.CreatedAt.Equal(other.CreatedAt) && maps.Equal(img.Labels, other.Labels)
}

// drop removes all entries of a name.
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

// Delete deletes a name. NotFound if it doesn't exist.
func (n *Names) Delete(ctx context.Context, name string) error {
	errs, err := n.DeleteAll(ctx, []string{name})
	return cmp.Or(err, errs[0])
}

// DeleteAll deletes the names that exist, each as [Names.Lookup] finds it, all in one change. It returns nil or NotFound
// for each. After another error none is deleted.
func (n *Names) DeleteAll(ctx context.Context, names []string) ([]error, error) {
	return n.remove(ctx, names, func(ix *layout.Index) func(string) string {
		find := newPositions(ix).find
		return func(name string) string {
			if i := findSpelling(find, name); i >= 0 {
				return ix.Entries[i].Name
			}
			return name
		}
	}, func(e layout.Entry) string { return e.Name },
		func(name string) events.Event { return events.Event{Name: name} },
		func(name string) error { return fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound) })
}

// DeleteUnnamed is DeleteAll for entries without a name, selected by the digests of their targets.
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

// remove removes the entries with one of the keys; actual translates the given keys to those of the index. For each key
// without an entry it returns the error of missing.
func (n *Names) remove(ctx context.Context, given []string, actual func(*layout.Index) func(key string) string,
	keyOf func(layout.Entry) string, event func(key string) events.Event, missing func(key string) error) ([]error, error) {
	errs := make([]error, len(given))
	err := n.changeExisting(ctx, func(ix *index) error {
		keys, translate := make([]string, len(given)), actual(ix.Index)
		for i, key := range given {
			keys[i] = translate(key)
		}
		found := make(map[string]bool, len(keys))
		for _, key := range keys {
			found[key] = false
		}
		ix.Entries = slices.DeleteFunc(ix.Entries, func(e layout.Entry) bool {
			key := keyOf(e)
			_, wanted := found[key]
			if wanted = wanted && key != ""; wanted {
				found[key] = true
			}
			return wanted
		})
		for i, key := range keys {
			if !found[key] {
				errs[i] = missing(key)
				continue
			}
			found[key] = false // a key that is given twice is missing the second time
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
	events []events.Event // to be logged after the change
}

// changed records the event that an image was created or changed.
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

// read returns the current names. They are empty if the layout doesn't exist.
func (n *Names) read() (*layout.Index, error) { return n.dir.ReadIndex() }

// errUnchanged ends a change that has nothing to write. It is not an error for the caller.
var errUnchanged = errors.New("nothing to change")

// change calls f to change the names under the lock of index.json, and logs the changes.
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

// changeExisting is change for existing names. If the store or the namespace doesn't exist, it is not created: f gets
// an empty index, and nothing is written.
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

// changeTwo is change for two namespaces, in the order of their names.
func changeTwo(ctx context.Context, two [2]*Names, first int, f func([2]*index) error) error {
	var ix [2]*index
	create := func() error { return cmp.Or(two[0].create(ctx), two[1].create(ctx)) }
	err := layout.ChangeTwo(ctx, [2]layout.Dir{two[0].dir, two[1].dir}, first, create, func(read [2]*layout.Index) error {
		ix = [2]*index{{Index: read[0]}, {Index: read[1]}}
		return f(ix)
	})
	if err == nil {
		two[first].log(ix[first])
		two[1-first].log(ix[1-first])
	}
	return err
}

func (n *Names) log(ix *index) {
	for i := range ix.events {
		ix.events[i].Namespace = n.namespace
	}
	events.Append(n.store.Root(), ix.events...)
}
