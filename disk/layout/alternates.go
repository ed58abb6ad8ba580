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

// AlternatesEnv is the environment variable that names alternates: layouts whose blobs are read where a layout has none
// of its own, and to which nothing is written. Paths are separated by colons. One that begins with a double quote is
// quoted as in C, as git's GIT_ALTERNATE_OBJECT_DIRECTORIES is.
//
// Only the environment names alternates, never a file of the layout: a stranger's layout decides nothing about other
// directories.
const AlternatesEnv = "DIST_ALTERNATES"

// maxAlternates bounds the directories that are looked through for a blob.
const maxAlternates = 64

// alternates opens the layouts that a value of [AlternatesEnv] names. One that doesn't exist is empty.
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

// splitPaths splits a list of paths at its colons. Empty ones are left out.
func splitPaths(list string) ([]string, error) {
	var paths []string
	for list != "" {
		var p string
		if list[0] == '"' {
			quoted, err := strconv.QuotedPrefix(list)
			if err != nil {
				return nil, fmt.Errorf("the quotation that begins %.40s does not end, or has an unknown escape", list)
			}
			if p, err = strconv.Unquote(quoted); err != nil {
				return nil, err
			}
			list = list[len(quoted):]
			if list != "" && list[0] != ':' {
				return nil, fmt.Errorf("after the quotation %.40s there is no colon", quoted)
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

// tree returns the layout's own tree for 0, and then its alternates.
func (d Dir) tree(i int) disk.Tree {
	if i == 0 {
		return d.Tree
	}
	return d.Alternates[i-1]
}

// FindBlob returns the tree that has a blob, the layout's own before its alternates, and what the file system knows of it.
// What is no regular file is no blob. fs.ErrNotExist if there is none.
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

// OpenBlob opens a blob for reading, where FindBlob finds it. If there is none, but something else of its name, the error is
// FailedPrecondition.
func (d Dir) OpenBlob(dgst digest.Digest) (*os.File, error) {
	name := BlobName(dgst)
	var none error = fs.ErrNotExist
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
		none = err
	}
	return nil, none
}
