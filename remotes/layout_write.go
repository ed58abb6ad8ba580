package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	ondisk "distkit/disk/layout"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Push stores a blob, or a manifest under its digest or a name. It follows distkit-layout(5), so that it is safe beside
// the store's own commands: only complete and verified content appears under a digest, and names are changed under the
// lock of index.json.
func (l *Layout) Push(ctx context.Context, id string, content io.Reader, hintList ...string) (Pushed, error) {
	h := parseHints(hintList)
	h.offset = 0 // the offset of a put applies to batches only
	pushed, err := l.push(ctx, id, content, h)
	if err != nil {
		return Pushed{}, fmt.Errorf("put %s into %s: %w", id, l.dir, err)
	}
	return pushed, nil
}

func (l *Layout) push(ctx context.Context, id string, content io.Reader, h hints) (Pushed, error) {
	dgst, isDigest, err := parseDigest(id)
	if err != nil {
		return Pushed{}, err
	}
	if !isDigest && !isName(id) {
		return Pushed{}, classf(errdefs.ErrInvalidArgument, "not a name, tag or digest")
	}
	d, err := l.create()
	if err != nil {
		return Pushed{}, err
	}
	if ondisk.IsStore(d.Tree) {
		release, err := ondisk.Share(ctx, d.Tree)
		if err != nil {
			return Pushed{}, err
		}
		defer release()
	}
	if isDigest {
		size, state, err := store(ctx, d, dgst, content, h)
		desc := ocispec.Descriptor{MediaType: h.mediaType, Digest: dgst, Size: size}
		if err == nil {
			err = l.listReferrer(ctx, d, desc)
		}
		return Pushed{desc, state}, err
	}
	b, desc, err := readTagged(content, h)
	if err != nil {
		return Pushed{}, err
	}
	var labels map[string]string
	var made bool
	state := Stored
	// A sweep holds the lock of the names while it works, so it can't delete the manifest before the name exists.
	err = l.change(ctx, d, func(index *ondisk.Index) error {
		if i := index.Find(id); i >= 0 {
			switch old, err := index.Entries[i].Descriptor(); {
			case err == nil && old.Digest == desc.Digest:
				state = Exists
			case l.ifAbsent:
				return errTagged(old.Digest)
			}
		}
		_, _, err := store(ctx, d, desc.Digest, bytes.NewReader(b), h)
		if err == nil {
			labels, made, err = index.Point(id, desc, time.Now())
		}
		return err
	})
	if err != nil {
		return Pushed{}, err
	}
	topic := "/images/update"
	if made {
		topic = "/images/create"
	}
	logEvent(d, events.Event{Namespace: namespace(d), Topic: topic, Name: id, Digest: string(desc.Digest), Size: desc.Size, Labels: labels})
	return Pushed{desc, state}, nil
}

// change changes index.json. It creates the layout again if another process has removed it.
func (l *Layout) change(ctx context.Context, d ondisk.Dir, f func(*ondisk.Index) error) error {
	return d.Change(ctx, func() error { _, err := l.create(); return err }, f)
}

// logEvent logs a change of a store. Other layouts have no log.
func logEvent(d ondisk.Dir, e events.Event) {
	if ondisk.IsStore(d.Tree) {
		events.Append(string(d.Tree), e)
	}
}

// namespace returns the namespace that a layout is in its store.
func namespace(d ondisk.Dir) string {
	if d.Name == "." {
		return "default"
	}
	return path.Base(d.Name)
}

// listReferrer adds an entry without a name to index.json for a manifest that refers to a subject. Lists of referrers
// are made from such entries.
func (l *Layout) listReferrer(ctx context.Context, d ondisk.Dir, desc ocispec.Descriptor) error {
	if desc.Size > MaxManifest || desc.MediaType != "" && !isIndex(desc.MediaType) && !isManifest(desc.MediaType) {
		return nil
	}
	b, err := d.ReadBlob(desc.Digest, MaxManifest)
	if err != nil {
		return err
	}
	if desc.MediaType == "" {
		desc.MediaType = sniff(b)
	}
	subject := ondisk.Subject(b)
	if desc.MediaType == mediaTypeOctets || subject == "" {
		return nil
	}
	return l.change(ctx, d, func(index *ondisk.Index) error {
		_, err := index.AddReferrers(ondisk.Referrer{Descriptor: desc, Subject: subject})
		return err
	})
}

// readTagged reads a manifest that is to get a name, and returns its descriptor.
func readTagged(content io.Reader, h hints) (b []byte, desc ocispec.Descriptor, err error) {
	b, err = io.ReadAll(io.LimitReader(content, MaxManifest+1))
	if err != nil {
		return nil, desc, err
	}
	if len(b) > MaxManifest {
		return nil, desc, classf(errdefs.ErrInvalidArgument, "the content is larger than a manifest may be (%s)", sizeString(MaxManifest))
	}
	if !json.Valid(b) {
		return nil, desc, classf(errdefs.ErrInvalidArgument, "the content is not a manifest")
	}
	desc = ocispec.Descriptor{MediaType: h.mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if desc.MediaType = manifestType(desc.MediaType, b); desc.MediaType == mediaTypeOctets {
		return nil, desc, classf(errdefs.ErrInvalidArgument, "the content doesn't state its media type: give the hint mediatype:TYPE")
	}
	return b, desc, nil
}

// create creates the layout if it doesn't exist, in the order of distkit-layout(5).
func (l *Layout) create() (ondisk.Dir, error) {
	d, err := l.files()
	if err != nil && !errdefs.IsNotFound(err) {
		return d, err
	}
	if there, xerr := d.Exists(); there || xerr != nil {
		return d, xerr
	}
	if merr := d.Tree.MakeDir(d.Name); merr != nil {
		return d, merr
	}
	if err != nil {
		files, err := os.ReadDir(l.dir)
		if err != nil {
			return d, err
		}
		if slices.ContainsFunc(files, isForeign) {
			return d, classf(errdefs.ErrFailedPrecondition, "the directory is neither an OCI image layout nor empty")
		}
	}
	if err := d.Tree.MakeDir(ocispec.ImageBlobsDir); err != nil {
		return d, err
	}
	return d, d.Create(".")
}

// isForeign reports whether a file can't belong to a layout that another process is just creating.
func isForeign(f fs.DirEntry) bool {
	switch f.Name() {
	case ocispec.ImageBlobsDir, ocispec.ImageIndexFile, ocispec.ImageLayoutFile:
		return false
	}
	return !strings.HasPrefix(f.Name(), ondisk.TempPrefix)
}

func isName(s string) bool {
	return s != "" && len(s) <= 4096 && strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f }) < 0
}

// store makes a blob appear, complete and synced, or freshens it if it exists. content begins at the hinted offset.
func store(ctx context.Context, d ondisk.Dir, dgst digest.Digest, content io.Reader, h hints) (int64, State, error) {
	wrongSize := func(size int64) error {
		return classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(size), h.size)
	}
	size, exists, err := d.PutBlob(ctx, dgst, h.size, h.offset, func(f *os.File) error {
		whole := io.MultiReader(io.NewSectionReader(f, 0, h.offset), content)
		n, err := io.Copy(f, newVerifier(ctx, io.NopCloser(whole), dgst, 0, h.offset, -1))
		if n += h.offset; err == nil && h.size >= 0 && h.size != n {
			err = wrongSize(n)
		}
		return err
	})
	switch {
	case errdefs.IsDataLoss(err) && h.offset > 0:
		return 0, "", classf(errdefs.ErrAborted, "the data of an earlier put may be wrong, and was removed: put all of it: %v", err)
	case err != nil:
		return 0, "", err
	case exists:
		return size, Exists, nil
	}
	logEvent(d, events.Event{Topic: "/content/create", Digest: string(dgst), Size: size})
	return size, Stored, nil
}

// Tags lists the names.
func (l *Layout) Tags(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		_, names, err := l.checkedIndex()
		if err != nil {
			yield("", fmt.Errorf("list names of %s: %w", l.dir, err))
			return
		}
		for _, desc := range names {
			if name := desc.Annotations[ocispec.AnnotationRefName]; isName(name) && !yield(name, nil) {
				return
			}
		}
	}
}

func (l *Layout) checkedIndex() (ondisk.Dir, []ocispec.Descriptor, error) {
	d, err := l.files()
	if err != nil {
		return d, nil, err
	}
	names, err := index(d)
	return d, names, err
}

// Referrers lists the manifests in index.json that have the subject.
func (l *Layout) Referrers(ctx context.Context, subject digest.Digest, filter ReferrerFilter) iter.Seq2[ocispec.Descriptor, error] {
	return func(yield func(ocispec.Descriptor, error) bool) {
		fail := func(err error) {
			yield(ocispec.Descriptor{}, fmt.Errorf("list referrers of %s in %s: %w", subject, l.dir, err))
		}
		d, err := l.files()
		if err == nil {
			err = d.Referrers(MaxManifest, func(desc ocispec.Descriptor, of digest.Digest) error {
				if of == subject && filter.selects(desc) && !yield(desc, nil) {
					return errStopped
				}
				return nil
			})
		}
		if err != nil && err != errStopped {
			fail(err)
		}
	}
}

// Delete deletes a name or, given a digest, all names of a manifest. The blob stays for the sweep, because other
// namespaces may use it.
func (l *Layout) Delete(ctx context.Context, id string) error {
	if err := l.delete(ctx, id); err != nil {
		return fmt.Errorf("delete %s from %s: %w", id, l.dir, err)
	}
	return nil
}

func (l *Layout) delete(ctx context.Context, id string) error {
	d, isDigest, err := parseDigest(id)
	if err != nil {
		return err
	}
	if !isDigest && !isName(id) {
		return classf(errdefs.ErrInvalidArgument, "not a name, tag or digest")
	}
	files, err := l.files()
	if err != nil {
		return err
	}
	if there, err := files.Exists(); err != nil {
		return err
	} else if !there {
		return classf(errdefs.ErrNotFound, "no such name")
	}
	var deleted []string
	err = l.change(ctx, files, func(index *ondisk.Index) error {
		n := len(index.Entries)
		index.Entries = slices.DeleteFunc(index.Entries, func(e ondisk.Entry) bool {
			match := !isDigest && e.Name == id
			if isDigest {
				desc, err := e.Descriptor()
				match = err == nil && desc.Digest == d
			}
			if match && e.Name != "" {
				deleted = append(deleted, e.Name)
			}
			return match
		})
		if len(index.Entries) == n {
			return classf(errdefs.ErrNotFound, "no such name")
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range deleted {
		logEvent(files, events.Event{Namespace: namespace(files), Topic: "/images/delete", Name: name})
	}
	return nil
}
