package archive

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"distkit/disk/sys"
	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A report records what a layer in overlay form can't know without the layers below it, in the
// form that dist-apply(1) describes under OUTPUT.
type report struct {
	w *bufio.Writer

	// Paths, by the tree's hash: directories that no entry has named yet, and hard links whose
	// target is not here.
	implicit, links map[uint64]struct{}

	again bool // the layer can't be settled: the rest of it is only read

	// What was written, and what may be: no more than the layer's own bytes and a constant.
	written, most int64
}

// maxReport is the constant: bytes of a report that are the least bound of any layer.
const maxReport = 1 << 20

// A record is a word, the path that it is about, and for some a target or reason.
const (
	recordDirectory = "directory"
	recordNamed     = "named"
	recordWhiteout  = "whiteout"
	recordLink      = "link"
	recordAgain     = "again"
)

// reportTo makes the tree, whose target must be empty, record in w what it can't know.
func (t *tree) reportTo(w io.Writer) error {
	switch {
	case t.opaque == "":
		return refused("what is unresolved is known in overlay form only")
	case !t.root.ours:
		return errclass.As(errors.New("what is unresolved is known in an empty directory only"), errdefs.ErrFailedPrecondition)
	}
	t.report = &report{w: bufio.NewWriter(w), implicit: map[uint64]struct{}{}, links: map[uint64]struct{}{}, most: maxReport}
	t.implied("")
	return nil
}

// record adds a record, where there is a report. An error of the writer stays until it is flushed.
func (t *tree) record(kind, p, target string) {
	if t.report == nil {
		return
	}
	if p == "" {
		p = "."
	}
	if n := int64(len(kind) + len(p) + len(target) + 3); kind != recordAgain {
		if t.report.written += n; t.report.written > t.report.most {
			t.reapply(p, "more is unresolved than the layer itself is long")
			return
		}
	}
	for _, field := range []string{kind, p, target} {
		_, _ = t.report.w.WriteString(field)
		_ = t.report.w.WriteByte(0)
	}
}

// implied records that the directory p was made since something is in it.
func (t *tree) implied(p string) {
	if t.report != nil && !t.isOpaque(p) {
		t.report.implicit[t.hash(p)] = struct{}{}
		t.record(recordDirectory, p, "")
	}
}

// reapply records that the layer is to be applied to its parents.
func (t *tree) reapply(p, reason string) {
	if t.report != nil && !t.report.again {
		t.report.again = true
		t.record(recordAgain, p, reason)
	}
}

func (t *tree) isToApplyAgain() bool { return t.report != nil && t.report.again }

// mayBeWell reports whether an entry that failed with err could succeed once lower layers are present. The layer is then marked as one to
// apply again.
func (t *tree) mayBeWell(h *tar.Header, err error) bool {
	if t.report == nil || !errdefs.IsInvalidArgument(err) {
		return false
	}
	t.reapply(layer.Clean(h.Name), err.Error())
	return true
}

// named records that the directory p has its own entry after all.
func (t *tree) named(p string) {
	if t.report != nil && has(t.report.implicit, t.hash(p)) {
		delete(t.report.implicit, t.hash(p))
		t.record(recordNamed, p, "")
	}
}

func (t *tree) flushReport() error {
	if t.report == nil {
		return nil
	}
	if err := t.report.w.Flush(); err != nil {
		return fmt.Errorf("write what is unresolved: %w", err)
	}
	return nil
}

// missing tells at which path a lookup of what must be there met nothing.
type missing struct {
	dir  *dir   // the last directory that is there
	rest string // below it, as yet unresolved
}

// tidy returns a path without empty components and those that mean the directory itself.
func tidy(p string) string {
	parts := slices.DeleteFunc(strings.Split(p, "/"), func(s string) bool { return s == "" || s == "." })
	return strings.Join(parts, "/")
}

func (m *missing) Error() string { return unix.ENOENT.Error() }
func (m *missing) Unwrap() error { return unix.ENOENT }

// lowerPath turns a lookup that failed with err into the path that base would have in a lower layer. ok is false if no lower layer can
// show it.
func (t *tree) lowerPath(base string, err error) (target string, ok bool) {
	var m *missing
	if t.report == nil || !errors.As(err, &m) || t.isOpaque(m.dir.path) {
		return "", false
	}
	return join(m.dir.path, join(m.rest, base)), true
}

// unresolvedLink makes a hard link to what lower layers may have at target: a socket, which no
// layer can hold, stands for it.
func (a *applier) unresolvedLink(parent, base, target string) error {
	t := a.tree
	d, err := t.lookup(parent)
	if err != nil {
		return err
	}
	name := join(d.path, base)
	switch {
	case strings.Contains("/"+target+"/", "/../"):
		t.reapply(name, "hard link through .. of what lower layers may have")
	case target == name, strings.HasPrefix(target, name+"/"):
		t.reapply(name, "hard link that replaces what it leads to")
	}
	if t.report.again {
		return nil
	}
	t.record(recordLink, name, target)
	if err := a.create(d, base, func() error { return sys.Mknodat(d.fd, base, unix.S_IFSOCK|0o600, 0) }); err != nil {
		return err
	}
	t.report.links[t.hash(name)] = struct{}{}
	return nil
}
