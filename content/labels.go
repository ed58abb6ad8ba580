package content

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// maxLabel bounds the length of a label's key and value together. containerd has the same bound.
const maxLabel = 4096

// maxLabels bounds all labels of a blob, in bytes of their file.
const maxLabels = 1 << 20

const labelsDir = "labels"

func labelName(dgst digest.Digest) string {
	return path.Join(labelsDir, string(dgst.Algorithm()), dgst.Encoded())
}

// readLabels returns a blob's labels and the time of their last change. A damaged file is DataLoss, which is different
// from having no labels.
func readLabels(tree disk.Tree, dgst digest.Digest) (map[string]string, time.Time, error) {
	labels, changed, err := parseLabels(tree, labelName(dgst))
	if errdefs.IsFailedPrecondition(err) { // a file that is too large or of another kind, or a parent that is not a directory
		if _, serr := tree.Stat(labelName(dgst)); serr == nil {
			err = errclass.As(disk.Cause(err), errdefs.ErrDataLoss)
		}
	}
	if errdefs.IsDataLoss(err) {
		return nil, time.Time{}, fmt.Errorf("labels of %s are damaged; dist-label --replace repairs them: %w", dgst, err)
	}
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("labels of %s: %w", dgst, disk.Cause(err))
	}
	return labels, changed, nil
}

func parseLabels(tree disk.Tree, name string) (labels map[string]string, changed time.Time, err error) {
	f, err := tree.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, time.Time{}, nil
	}
	if err != nil {
		return nil, time.Time{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, time.Time{}, err
	}
	b, err := disk.ReadAll(f, maxLabels)
	if err != nil {
		return nil, time.Time{}, err
	}
	if err := json.Unmarshal(b, &labels); err != nil {
		return nil, time.Time{}, errclass.As(err, errdefs.ErrDataLoss)
	}
	return labels, fi.ModTime(), nil
}

// writeLabels replaces a blob's labels durably.
func (s *Store) writeLabels(dgst digest.Digest, labels map[string]string, now time.Time) error {
	b, err := json.Marshal(labels)
	if err != nil {
		return err
	}
	if len(b) >= maxLabels {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "labels of %s: more than %d bytes", dgst, maxLabels)
	}
	name := labelName(dgst)
	if err := s.Tree.MakeDir(path.Dir(name)); err != nil {
		return fmt.Errorf("labels of %s: %w", dgst, err)
	}
	tmp, err := layout.WriteTemp(s.Tree, layout.Ingest, func(f *os.File) error {
		_, err := f.Write(append(b, '\n'))
		return err
	})
	if err != nil {
		return fmt.Errorf("labels of %s: %w", dgst, err)
	}
	// The kernel's clock for mtime is coarser than time.Now, and lags behind it.
	err = s.Tree.Touch(tmp, now)
	if err == nil {
		err = s.Tree.Rename(tmp, name)
	}
	if errors.Is(err, unix.EISDIR) { // damaged: a directory has taken the place of the file
		if err = s.dropLabels(dgst); err == nil {
			err = s.Tree.Rename(tmp, name)
		}
	}
	if err == nil {
		err = s.Tree.SyncDir(path.Dir(name))
	}
	if err != nil {
		_ = s.Tree.Remove(tmp)
		return fmt.Errorf("labels of %s: %w", dgst, err)
	}
	return nil
}

// dropLabels removes a blob's labels. If they are damaged and a directory is in their place, it is removed if it is
// empty; else the error is ENOTEMPTY.
func (s *Store) dropLabels(dgst digest.Digest) error {
	err := s.discard(labelName(dgst))
	if errors.Is(err, unix.EISDIR) {
		err = s.Tree.RemoveDir(labelName(dgst))
	}
	return err
}

// lockBlob locks a blob, so that changes of its labels and its deletion don't overlap. NotFound if the blob isn't
// stored.
func (s *Store) lockBlob(ctx context.Context, dgst digest.Digest) (*os.File, error) {
	if err := Validate(dgst); err != nil {
		return nil, err
	}
	f, err := s.LockBlob(ctx, dgst, unix.LOCK_EX)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, blobError(dgst, err)
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dgst, disk.Cause(err))
	}
	return f, nil
}

// lockOwn is lockBlob for changes that a user asks for: FailedPrecondition if only an alternate has the blob.
func (s *Store) lockOwn(ctx context.Context, dgst digest.Digest) (*os.File, error) {
	lock, err := s.lockBlob(ctx, dgst)
	return lock, s.notOwn(dgst, err)
}

// notOwn turns NotFound into FailedPrecondition if an alternate has the blob.
func (s *Store) notOwn(dgst digest.Digest, err error) error {
	if errdefs.IsNotFound(err) {
		if tree, _, lerr := s.lookup(dgst); lerr == nil && tree != s.Tree {
			err = errclass.Errorf(errdefs.ErrFailedPrecondition, "blob %s: it is in the alternate store %s, which is read-only", dgst, tree)
		}
	}
	return err
}

func checkLabels(labels map[string]string) error {
	for k, v := range labels {
		if k == "" || len(k)+len(v) > maxLabel {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "label %.40q: key and value must be 1 to %d bytes", k, maxLabel)
		}
	}
	return layout.CheckLabels(labels)
}

// Update changes labels of the blob info.Digest, and returns its new description. Without fieldpaths, or with "labels",
// it replaces all labels, even damaged ones. "labels.KEY" sets that one label, or deletes it if its value is empty.
//
// InvalidArgument: any other field. NotFound: the blob isn't stored. FailedPrecondition: only an alternate has it.
func (s *Store) Update(ctx context.Context, info Info, fieldpaths ...string) (Info, error) {
	if err := checkLabels(info.Labels); err != nil {
		return Info{}, err
	}
	lock, err := s.lockOwn(ctx, info.Digest)
	if err != nil {
		return Info{}, err
	}
	defer disk.Release(lock)
	labels := map[string]string{}
	if len(fieldpaths) == 0 {
		fieldpaths = []string{"labels"}
	}
	if !slices.Contains(fieldpaths, "labels") {
		old, _, err := readLabels(s.Tree, info.Digest)
		if err != nil {
			return Info{}, err
		}
		maps.Copy(labels, old)
	}
	for _, field := range fieldpaths {
		key, one := strings.CutPrefix(field, "labels.")
		switch {
		case field == "labels":
			labels = maps.Clone(info.Labels)
		case one:
			labels[key] = info.Labels[key]
		default:
			return Info{}, errclass.Errorf(errdefs.ErrInvalidArgument, "update %s: field %q can't be changed", info.Digest, field)
		}
		if labels == nil {
			labels = map[string]string{}
		}
	}
	maps.DeleteFunc(labels, func(_, v string) bool { return v == "" })
	if err := s.writeLabels(info.Digest, labels, time.Now()); err != nil {
		return Info{}, err
	}
	events.Append(s.Root(), events.Event{Topic: "/content/update", Digest: string(info.Digest), Labels: labels})
	fi, err := s.stat(info.Digest)
	if err != nil {
		return Info{}, err
	}
	return newInfo(s.Tree, info.Digest, fi, true)
}

// eachLabelled calls f with the digest and the attributes of each file of labels.
func (s *Store) eachLabelled(ctx context.Context, f func(digest.Digest, fs.FileInfo) error) error {
	for alg := range hexSize {
		err := s.eachEntryIn(ctx, path.Join(labelsDir, string(alg)), func(dir *os.File, e fs.DirEntry) error {
			if !e.Type().IsRegular() || !valid(alg, e.Name()) {
				return nil
			}
			dgst := digest.NewDigestFromEncoded(alg, e.Name())
			fi, err := disk.StatAt(dir, e.Name())
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("labels of %s: %w", dgst, disk.Cause(err))
			}
			return f(dgst, fi)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Labelled calls f with every blob that has a label with the given key, if the blob's labels have changed since the
// given time. Damaged labels count if their text contains the key.
func (s *Store) Labelled(ctx context.Context, key string, since time.Time, f func(digest.Digest) error) error {
	return s.eachLabelled(ctx, func(dgst digest.Digest, fi fs.FileInfo) error {
		if fi.ModTime().Before(since) {
			return nil
		}
		b, err := s.Tree.ReadFile(labelName(dgst), maxLabels)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case errdefs.IsFailedPrecondition(err): // not a regular file, or too large: no labels
			return nil
		case err != nil:
			return fmt.Errorf("labels of %s: %w", dgst, disk.Cause(err))
		}
		var labels map[string]json.RawMessage
		has := bytes.Contains(b, []byte(key))
		if json.Unmarshal(b, &labels) == nil {
			_, has = labels[key]
		}
		if !has {
			return nil
		}
		return f(dgst)
	})
}
