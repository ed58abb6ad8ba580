package look

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"distkit/layer"
)

// A Difference is a path at which two images differ.
type Difference struct {
	Path   string
	Change string   // A: only the second image has it, D: only the first, C: both
	What   []string // for C: type, mode, owner, size, content, target, device, xattrs, time
	A, B   *Entry   // the entry in each image, or nil
}

// Diff merges the layers of two images and calls f for each path at which they differ, sorted. It compares times only
// if times is true. maxMemory bounds the tree of each image. Errors are those of [Read].
func Diff(ctx context.Context, a, b []Layer, times bool, maxMemory int64, f func(Difference) error) error {
	var trees [2]*Tree
	for i, layers := range [][]Layer{a, b} {
		var err error
		if trees[i], err = Read(ctx, layers, Options{MaxMemory: maxMemory, Hash: true}); err != nil {
			return err
		}
	}
	nextA, stopA := iter.Pull(trees[0].all())
	defer stopA()
	nextB, stopB := iter.Pull(trees[1].all())
	defer stopB()
	ea, oka := nextA()
	eb, okb := nextB()
	for oka || okb {
		if err := ctx.Err(); err != nil {
			return err
		}
		d := Difference{A: ea, B: eb}
		switch order := comparePaths(ea, eb); {
		case order < 0:
			d = Difference{ea.Path, "D", nil, ea, nil}
			ea, oka = nextA()
		case order > 0:
			d = Difference{eb.Path, "A", nil, nil, eb}
			eb, okb = nextB()
		default:
			d.Path, d.Change, d.What = ea.Path, "C", differs(ea, eb, times)
			ea, oka = nextA()
			eb, okb = nextB()
		}
		if d.Change == "C" && len(d.What) == 0 {
			continue
		}
		if err := f(d); err != nil {
			return err
		}
	}
	return nil
}

// all returns the files of a tree, sorted, with the root directory first.
func (t *Tree) all() iter.Seq[*Entry] {
	return func(yield func(*Entry) bool) {
		_ = t.List("/", true, func(e *Entry) error {
			if !yield(e) {
				return errStop
			}
			return nil
		})
	}
}

var errStop = errors.New("stop")

// comparePaths orders two entries as trees list them: the entries in a directory follow it. A missing entry comes after
// all others.
func comparePaths(a, b *Entry) int {
	switch {
	case a == nil:
		return 1
	case b == nil:
		return -1
	}
	return slices.CompareFunc([]byte(a.Path), []byte(b.Path), func(x, y byte) int { return order(x) - order(y) })
}

func order(c byte) int {
	if c == '/' {
		return 0
	}
	return int(c) + 1
}

func differs(a, b *Entry, times bool) (what []string) {
	if a.Type != b.Type {
		return []string{"type"}
	}
	note := func(name string, differs bool) {
		if differs {
			what = append(what, name)
		}
	}
	note("mode", a.Perm != b.Perm)
	note("owner", a.UID != b.UID || a.GID != b.GID)
	note("size", a.Type == File && a.Size != b.Size)
	note("content", a.Type == File && a.sum != b.sum)
	note("target", a.Target != b.Target)
	note("device", a.Device != b.Device)
	note("xattrs", !slices.EqualFunc(a.Xattrs, b.Xattrs, func(x, y layer.Xattr) bool { return x.Name == y.Name && bytes.Equal(x.Value, y.Value) }))
	note("time", times && !a.ModTime.Equal(b.ModTime))
	return what
}

// String describes an entry in a few words: its mode, owner, size and target.
func (e *Entry) String() string {
	if e == nil {
		return ""
	}
	return strings.TrimSpace(fmt.Sprintf("%s %d:%d %d %s", e.ModeString(), e.UID, e.GID, e.Size, e.Target))
}
