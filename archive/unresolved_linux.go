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

// A report records what a layer in overlay form can't know without its parents, in the form that dist-apply(1)
// specifies under OUTPUT.
type report struct {
	w *bufio.Writer

	// Sets of paths by hash: directories that have no entry yet, and hard links whose targets this layer doesn't hold.
	implicit, links map[uint64]struct{}

	mustReapply bool // the layer must be applied to its parents: the rest of it is only read

	// The bytes written, and their bound: the layer's own size plus maxReport.
	written, limit int64
}

// maxReport is what a report may have in addition to the layer's own size, in bytes.
const maxReport = 1 << 20

// The kinds of records. A record is its kind, the path that it is about, and for some kinds a target or reason.
const (
	recordDirectory = "directory"
	recordNamed     = "named"
	recordWhiteout  = "whiteout"
	recordLink      = "link"
	recordAgain     = "again"
)

// reportTo makes the tree write a report to w. The target must be empty.
func (t *tree) reportTo(w io.Writer) error {
	switch {
	case t.opaque == "":
		return invalid("a report of what is unresolved needs whiteouts in overlay form")
	case !t.root.ours:
		return errclass.As(errors.New("a report of what is unresolved needs an empty directory"), errdefs.ErrFailedPrecondition)
	}
	t.report = &report{w: bufio.NewWriter(w), implicit: map[uint64]struct{}{}, links: map[uint64]struct{}{}, limit: maxReport}
	t.implied("")
	return nil
}

// record adds a record, if there is a report. A write error shows up in flushReport.
func (t *tree) record(kind, p, target string) {
	if t.report == nil {
		return
	}
	if p == "" {
		p = "."
	}
	if n := int64(len(kind) + len(p) + len(target) + 3); kind != recordAgain {
		if t.report.written += n; t.report.written > t.report.limit {
			t.reapply(p, "the report is longer than the layer")
			return
		}
	}
	for _, field := range []string{kind, p, target} {
		_, _ = t.report.w.WriteString(field)
		_ = t.report.w.WriteByte(0)
	}
}

// implied records that the directory p was created only because something is in it.
func (t *tree) implied(p string) {
	if t.report != nil && !t.isOpaque(p) {
		t.report.implicit[t.hash(p)] = struct{}{}
		t.record(recordDirectory, p, "")
	}
}

// reapply records that the layer must be applied to its parents, and why.
func (t *tree) reapply(p, reason string) {
	if t.report != nil && !t.report.mustReapply {
		t.report.mustReapply = true
		t.record(recordAgain, p, reason)
	}
}

func (t *tree) needsReapply() bool { return t.report != nil && t.report.mustReapply }

// mayResolve reports whether an entry that failed with err could succeed once lower layers are present. If so, it
// records that the layer must be applied to its parents.
func (t *tree) mayResolve(h *tar.Header, err error) bool {
	if t.report == nil || !errdefs.IsInvalidArgument(err) {
		return false
	}
	t.reapply(layer.Clean(h.Name), err.Error())
	return true
}

// named records that the directory p has an entry after all.
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
		return fmt.Errorf("write the report of what is unresolved: %w", err)
	}
	return nil
}

// missing is the error of a lookup for a path that must exist but doesn't.
type missing struct {
	dir  *dir   // the last directory that exists
	rest string // the rest of the path below it, unresolved
}

// tidy removes empty components and "." from a path.
func tidy(p string) string {
	parts := slices.DeleteFunc(strings.Split(p, "/"), func(s string) bool { return s == "" || s == "." })
	return strings.Join(parts, "/")
}

func (m *missing) Error() string { return unix.ENOENT.Error() }
func (m *missing) Unwrap() error { return unix.ENOENT }

// lowerPath turns a failed lookup into the path that base would have in a lower layer. ok is false if no lower layer
// can have it.
func (t *tree) lowerPath(base string, err error) (target string, ok bool) {
	var m *missing
	if t.report == nil || !errors.As(err, &m) || t.isOpaque(m.dir.path) {
		return "", false
	}
	return join(m.dir.path, join(m.rest, base)), true
}

// unresolvedLink creates a placeholder for a hard link to target, which a lower layer may have: a socket, which no
// layer can hold.
func (a *applier) unresolvedLink(parent, base, target string) error {
	t := a.tree
	d, err := t.lookup(parent)
	if err != nil {
		return err
	}
	name := join(d.path, base)
	switch {
	case strings.Contains("/"+target+"/", "/../"):
		t.reapply(name, "hard link through .. in a directory that lower layers may have")
	case target == name, strings.HasPrefix(target, name+"/"):
		t.reapply(name, "hard link that replaces what it leads to")
	}
	if t.report.mustReapply {
		return nil
	}
	t.record(recordLink, name, target)
	if err := a.create(d, base, func() error { return sys.Mknodat(d.fd, base, unix.S_IFSOCK|0o600, 0) }); err != nil {
		return err
	}
	t.report.links[t.hash(name)] = struct{}{}
	return nil
}
