package layout

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// AlternatesEnv is the environment variable that lists alternates: layouts from which blobs are read that the layout
// itself doesn't have. Nothing is written to an alternate. Paths are separated by colons. A path that begins with a
// double quote is quoted as in C, like those in git's GIT_ALTERNATE_OBJECT_DIRECTORIES.
//
// Only the environment lists alternates, never a file of the layout: an untrusted layout must not make us read other
// directories.
const AlternatesEnv = "DIST_ALTERNATES"

// maxAlternates is the largest number of alternates.
const maxAlternates = 64

// alternates opens the layouts listed in a value of [AlternatesEnv]. One that doesn't exist counts as empty.
func alternates(list string) ([]disk.Tree, error) {
	paths, err := splitPaths(list)
	if err != nil {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "%s: %w", AlternatesEnv, err)
	}
	if len(paths) > maxAlternates {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "%s names more than %d directories", AlternatesEnv, maxAlternates)
	}
	var trees []disk.Tree
	for _, p := range paths {
		d, err := open(p)
		if err == nil {
			err = Dir{Tree: d.Tree, Name: "."}.Check()
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("alternate store %s: %w", p, err)
		}
		trees = append(trees, d.Tree)
	}
	return trees, nil
}

// splitPaths splits a list of paths at its colons, and leaves out empty ones.
func splitPaths(list string) ([]string, error) {
	var paths []string
	for list != "" {
		var p string
		if list[0] == '"' {
			quoted, err := strconv.QuotedPrefix(list)
			if err != nil {
				return nil, fmt.Errorf("the quoted path that begins with %.40s has no closing quote or has an unknown escape", list)
			}
			if p, err = strconv.Unquote(quoted); err != nil {
				return nil, err
			}
			list = list[len(quoted):]
			if list != "" && list[0] != ':' {
				return nil, fmt.Errorf("no colon after the quoted path %.40s", quoted)
			}
			list = strings.TrimPrefix(list, ":")
		} else {
			p, list, _ = strings.Cut(list, ":")
		}
		if p != "" {
			paths = append(paths, p)
		}
	}
	return paths, nil
}

// tree returns the layout's own tree if i is 0, or else its alternate i-1.
func (d Dir) tree(i int) disk.Tree {
	if i == 0 {
		return d.Tree
	}
	return d.Alternates[i-1]
}

// FindBlob looks for a blob in the layout's own tree, and then in its alternates. It returns the first tree that has
// it, with the file's attributes. A name that is not a regular file is skipped. fs.ErrNotExist if no tree has the blob.
func (d Dir) FindBlob(dgst digest.Digest) (disk.Tree, fs.FileInfo, error) {
	name := BlobName(dgst)
	for i := range len(d.Alternates) + 1 {
		fi, err := d.tree(i).Stat(name)
		if err == nil && fi.Mode().IsRegular() {
			return d.tree(i), fi, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", nil, err
		}
	}
	return "", nil, fs.ErrNotExist
}

// OpenBlob opens a blob that FindBlob would find. The error is FailedPrecondition if no tree has the blob, but one has
// something else of its name.
func (d Dir) OpenBlob(dgst digest.Digest) (*os.File, error) {
	name := BlobName(dgst)
	var missing error = fs.ErrNotExist
	for i := range len(d.Alternates) + 1 {
		f, err := d.tree(i).Open(name)
		if err == nil {
			return f, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if fi, serr := d.tree(i).Stat(name); serr != nil || fi.Mode().IsRegular() {
			return nil, err
		}
		missing = err
	}
	return nil, missing
}
