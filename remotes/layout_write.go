package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Push stores a blob, or a manifest under its digest or a name. It follows distkit-layout(5),
// so that it can be used beside the store's own commands: nothing appears under a digest that
// is not complete and right, and names are changed under the lock of index.json.
func (l *Layout) Push(ctx context.Context, id string, content io.Reader, hintList ...string) (Pushed, error) {
	pushed, err := l.push(ctx, id, content, parseHints(hintList))
	if err != nil {
		return Pushed{}, fmt.Errorf("put %s into %s: %w", id, l.dir, err)
	}
	return pushed, nil
}

func (l *Layout) push(ctx context.Context, id string, content io.Reader, h hints) (Pushed, error) {
	d, isDigest, err := parseDigest(id)
	if err == nil {
		err = l.create()
	}
	if err != nil {
		return Pushed{}, err
	}
	if isDigest {
		size, state, err := l.store(ctx, d, content, h)
		desc := ocispec.Descriptor{MediaType: h.mediaType, Digest: d, Size: size}
		if err == nil {
			err = l.listReferrer(desc)
		}
		return Pushed{desc, state}, err
	}
	if !isName(id) {
		return Pushed{}, classf(errdefs.ErrInvalidArgument, "not a name, tag or digest")
	}
	b, desc, err := readTagged(content, h)
	if err != nil {
		return Pushed{}, err
	}
	if _, _, err := l.store(ctx, desc.Digest, bytes.NewReader(b), h); err != nil {
		return Pushed{}, err
	}
	named := desc
	named.Annotations = map[string]string{ocispec.AnnotationRefName: id}
	return Pushed{desc, Stored}, l.changeIndex(func(index *ocispec.Index) error {
		index.Manifests = slices.DeleteFunc(index.Manifests, func(m ocispec.Descriptor) bool {
			return m.Annotations[ocispec.AnnotationRefName] == id
		})
		index.Manifests = append(index.Manifests, named)
		return nil
	})
}

// listReferrer has a manifest that refers to a subject stand in index.json, without a name: that is
// where referrers are looked for.
func (l *Layout) listReferrer(desc ocispec.Descriptor) error {
	if desc.Size > MaxManifest || desc.MediaType != "" && !isIndex(desc.MediaType) && !isManifest(desc.MediaType) {
		return nil
	}
	b, err := l.readFile(blobFile(desc.Digest))
	if err != nil {
		return err
	}
	if desc.MediaType == "" {
		desc.MediaType = sniff(b)
	}
	var head referrer
	if desc.MediaType == mediaTypeOctets || json.Unmarshal(b, &head) != nil || head.Subject == nil {
		return nil
	}
	return l.changeIndex(func(index *ocispec.Index) error {
		if !slices.ContainsFunc(index.Manifests, func(m ocispec.Descriptor) bool { return m.Digest == desc.Digest }) {
			index.Manifests = append(index.Manifests, desc)
		}
		return nil
	})
}

// readTagged reads a manifest that is put under a name, and tells what it is.
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
	if desc.MediaType == "" {
		if desc.MediaType = sniff(b); desc.MediaType == mediaTypeOctets {
			return nil, desc, classf(errdefs.ErrInvalidArgument, "the content does not tell its type: give the hint mediatype:TYPE")
		}
	}
	return b, desc, nil
}

// create makes a layout where there is none, in the order of distkit-layout(5).
func (l *Layout) create() error {
	err := l.check()
	if _, serr := os.Stat(filepath.Join(l.dir, ocispec.ImageLayoutFile)); err == nil && serr == nil {
		return nil
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	if err != nil {
		files, err := os.ReadDir(l.dir)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(files, isForeign) {
			return classf(errdefs.ErrFailedPrecondition, "the directory is neither an OCI image layout nor empty")
		}
	}
	if err := os.MkdirAll(filepath.Join(l.dir, ocispec.ImageBlobsDir), 0o755); err != nil {
		return err
	}
	empty, _ := json.Marshal(emptyIndex())
	if err := publish(filepath.Join(l.dir, ocispec.ImageIndexFile), empty, os.Link); err != nil {
		return err
	}
	version, _ := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	return publish(filepath.Join(l.dir, ocispec.ImageLayoutFile), version, os.Link)
}

// isForeign tells files that are not of a layout which another process is making just now.
func isForeign(f fs.DirEntry) bool {
	switch f.Name() {
	case ocispec.ImageBlobsDir, ocispec.ImageIndexFile, ocispec.ImageLayoutFile:
		return false
	}
	return !strings.HasPrefix(f.Name(), ".tmp-")
}

func emptyIndex() *ocispec.Index {
	index := &ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	index.SchemaVersion = 2
	return index
}

func isName(s string) bool {
	return s != "" && len(s) <= 4096 && strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f }) < 0
}

// store has a blob appear, complete and synced, or leaves what is there.
func (l *Layout) store(ctx context.Context, d digest.Digest, content io.Reader, h hints) (size int64, state State, err error) {
	target := filepath.Join(l.dir, blobFile(d))
	if info, err := os.Stat(target); err == nil && info.Mode().IsRegular() {
		if h.size >= 0 && h.size != info.Size() {
			return 0, "", classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(info.Size()), h.size)
		}
		return info.Size(), Exists, nil
	}
	dir := filepath.Dir(target)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, "", err
	}
	// Beside the blobs: they may be on another file system than the layout. The name is of
	// no digest, and so of no blob.
	f, err := os.CreateTemp(dir, ".tmp-*")
	if err != nil {
		return 0, "", err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if size, err = io.Copy(f, newVerifier(ctx, io.NopCloser(content), d, 0, 0, -1)); err != nil {
		return 0, "", err
	}
	if h.size >= 0 && h.size != size {
		return 0, "", classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(size), h.size)
	}
	if err := f.Chmod(0o444); err != nil {
		return 0, "", err
	}
	if err := f.Sync(); err != nil {
		return 0, "", err
	}
	if err := os.Rename(f.Name(), target); err != nil {
		return 0, "", err
	}
	return size, Stored, disk.SyncDir(dir)
}

// changeIndex replaces index.json by what f makes of it, under its lock.
func (l *Layout) changeIndex(f func(*ocispec.Index) error) error {
	file := filepath.Join(l.dir, ocispec.ImageIndexFile)
	lock, err := disk.LockFile(file, os.O_RDWR|os.O_CREATE, 0o644, unix.LOCK_EX)
	if err != nil {
		return fmt.Errorf("lock %s: %w", file, err)
	}
	defer lock.Close()
	b, err := io.ReadAll(io.LimitReader(lock, MaxManifest+1))
	if err != nil {
		return err
	}
	index := emptyIndex()
	if len(b) > 0 {
		if err := json.Unmarshal(b, index); err != nil {
			return classf(errdefs.ErrDataLoss, "%s: %w", file, err)
		}
	}
	if err := f(index); err != nil {
		return err
	}
	if b, err = json.Marshal(index); err != nil {
		return err
	}
	return publish(file, b, os.Rename)
}

// publish has a small file appear by rename, or by link, which leaves one that is there.
func publish(file string, b []byte, appear func(from, to string) error) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".tmp-*")
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		os.Remove(f.Name()) // gone already by rename
	}()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := appear(f.Name(), file); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return disk.SyncDir(filepath.Dir(file))
}

// Tags lists the names.
func (l *Layout) Tags(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		names, err := l.checkedIndex()
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

func (l *Layout) checkedIndex() ([]ocispec.Descriptor, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	return l.index()
}

// Referrers lists those of the manifests in index.json that have the subject.
func (l *Layout) Referrers(ctx context.Context, subject digest.Digest, artifactType string) iter.Seq2[ocispec.Descriptor, error] {
	return func(yield func(ocispec.Descriptor, error) bool) {
		fail := func(err error) {
			yield(ocispec.Descriptor{}, fmt.Errorf("list referrers of %s in %s: %w", subject, l.dir, err))
		}
		names, err := l.checkedIndex()
		if err != nil {
			fail(err)
			return
		}
		seen := map[digest.Digest]bool{}
		for _, desc := range names {
			if seen[desc.Digest] || desc.Digest.Validate() != nil || desc.Size > MaxManifest {
				continue
			}
			seen[desc.Digest] = true
			b, err := l.readFile(blobFile(desc.Digest))
			if errors.Is(err, fs.ErrNotExist) {
				continue // the rest of an index that is not all here
			}
			if err != nil {
				fail(err)
				return
			}
			var head referrer
			if json.Unmarshal(b, &head) != nil || head.Subject == nil || head.Subject.Digest != subject {
				continue
			}
			head.describe(&desc)
			if (artifactType == "" || desc.ArtifactType == artifactType) && !yield(desc, nil) {
				return
			}
		}
	}
}

// Delete deletes a name, or by digest the names of a manifest; its blob stays for the sweep,
// since other namespaces may use it.
func (l *Layout) Delete(ctx context.Context, id string) error {
	if err := l.delete(id); err != nil {
		return fmt.Errorf("delete %s from %s: %w", id, l.dir, err)
	}
	return nil
}

func (l *Layout) delete(id string) error {
	d, isDigest, err := parseDigest(id)
	if err != nil {
		return err
	}
	if !isDigest && !isName(id) {
		return classf(errdefs.ErrInvalidArgument, "not a name, tag or digest")
	}
	if err := l.check(); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(l.dir, ocispec.ImageIndexFile)); errors.Is(err, fs.ErrNotExist) {
		return classf(errdefs.ErrNotFound, "no such name")
	}
	return l.changeIndex(func(index *ocispec.Index) error {
		n := len(index.Manifests)
		index.Manifests = slices.DeleteFunc(index.Manifests, func(m ocispec.Descriptor) bool {
			return isDigest && m.Digest == d || !isDigest && m.Annotations[ocispec.AnnotationRefName] == id
		})
		if len(index.Manifests) == n {
			return classf(errdefs.ErrNotFound, "no such name")
		}
		return nil
	})
}
