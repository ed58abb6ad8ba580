package content

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"distkit/disk"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// maxLabel bounds a label's key and value together, as containerd does.
const maxLabel = 4096

func (s *Store) labelPath(dgst digest.Digest) string {
	alg, hex, _ := split(string(dgst))
	return s.file("labels", string(alg), hex)
}

// readLabels gives a blob's labels and when they last changed. A file that doesn't parse is
// an error: labels decide what a sweep spares.
func (s *Store) readLabels(dgst digest.Digest) (map[string]string, time.Time, error) {
	f, err := os.Open(s.labelPath(dgst))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, time.Time{}, nil
	}
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("labels of %s: %w", dgst, cause(err))
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("labels of %s: %w", dgst, cause(err))
	}
	var labels map[string]string
	if err := json.NewDecoder(f).Decode(&labels); err != nil {
		return nil, time.Time{}, errclass.As(fmt.Errorf("labels of %s: %w", dgst, err), errdefs.ErrDataLoss)
	}
	return labels, fi.ModTime(), nil
}

// writeLabels replaces a blob's labels, durably.
func (s *Store) writeLabels(dgst digest.Digest, labels map[string]string, now time.Time) error {
	b, err := json.Marshal(labels)
	if err != nil {
		return err
	}
	path := s.labelPath(dgst)
	if err := disk.MakeDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("labels of %s: %w", dgst, err)
	}
	tmp, err := s.writeTemp(append(b, '\n'))
	if err != nil {
		return fmt.Errorf("labels of %s: %w", dgst, err)
	}
	// The kernel's clock for mtime is coarser than time.Now, and must not lag behind it.
	err = os.Chtimes(tmp, now, now)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = disk.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("labels of %s: %w", dgst, err)
	}
	return nil
}

// lockBlob locks the blob's own file, so that changes of labels and its deletion follow each
// other. NotFound if there is no such blob.
func (s *Store) lockBlob(dgst digest.Digest) (unlock func(), err error) {
	for {
		f, err := s.File(dgst)
		if err != nil {
			return nil, err
		}
		if err := disk.Lock(f.File, unix.LOCK_EX); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", dgst, err)
		}
		if disk.Names(s.blobPath(dgst), f.File) {
			return func() { disk.Unlock(f.File); _ = f.Close() }, nil
		}
		_ = f.Close()
	}
}

func checkLabels(labels map[string]string) error {
	for k, v := range labels {
		if k == "" || len(k)+len(v) > maxLabel {
			return errclass.As(fmt.Errorf("label %.40q: key and value must be 1 to %d bytes", k, maxLabel), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Update changes labels of the blob info.Digest. Without fieldpaths, or with "labels", all
// are replaced; "labels.KEY" sets that one, or deletes it where its value is empty. Any
// other field is InvalidArgument; a missing blob NotFound. It gives what is there then.
func (s *Store) Update(_ context.Context, info Info, fieldpaths ...string) (Info, error) {
	if err := checkLabels(info.Labels); err != nil {
		return Info{}, err
	}
	unlock, err := s.lockBlob(info.Digest)
	if err != nil {
		return Info{}, err
	}
	defer unlock()
	labels, _, err := s.readLabels(info.Digest)
	if err != nil {
		return Info{}, err
	}
	if labels == nil {
		labels = map[string]string{}
	}
	if len(fieldpaths) == 0 {
		fieldpaths = []string{"labels"}
	}
	for _, field := range fieldpaths {
		key, one := strings.CutPrefix(field, "labels.")
		switch {
		case field == "labels":
			labels = map[string]string{}
			maps.Copy(labels, info.Labels)
		case one:
			labels[key] = info.Labels[key]
		default:
			return Info{}, errclass.As(fmt.Errorf("update %s: field %q can't be changed", info.Digest, field), errdefs.ErrInvalidArgument)
		}
	}
	maps.DeleteFunc(labels, func(_, v string) bool { return v == "" })
	if err := s.writeLabels(info.Digest, labels, time.Now()); err != nil {
		return Info{}, err
	}
	events.Append(s.root, events.Event{Topic: "/content/update", Digest: string(info.Digest), Labels: labels})
	_, fi, err := s.stat(info.Digest)
	if err != nil {
		return Info{}, err
	}
	return s.info(info.Digest, fi, true)
}
