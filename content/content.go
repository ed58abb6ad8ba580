// Package content is a store of blobs named by their digest, in a directory that is an OCI
// image layout, shared by any number of processes without a daemon.
//
// A blob enters through a [Writer], which holds a kernel lock on its ingest, can be resumed
// by another process, and publishes the blob by rename once its size and digest are
// verified. What a process leaves behind when it dies at any instant is either a complete
// blob or an ingest that resumes. The page distkit-layout(5), layout.5.md beside this file,
// specifies every file; comments cite its sections.
//
// Errors carry the classes of [github.com/containerd/errdefs]: NotFound, AlreadyExists,
// Unavailable (another writer holds it), InvalidArgument, NotImplemented (a digest algorithm
// other than sha256 and sha512). A wrong digest or size is DataLoss and FailedPrecondition.
package content

import (
	"strconv"
	"strings"
	"time"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Info describes a blob at rest.
type Info struct {
	Digest    digest.Digest
	Size      int64
	CreatedAt time.Time // stored, or freshened by an ingest that found it there
	UpdatedAt time.Time // that, or the last change of its labels
	Labels    map[string]string
}

// Field gives the fields that containerd's filters know: digest, size, labels.KEY.
func (i Info) Field(fieldpath []string) (value string, present bool) {
	switch {
	case len(fieldpath) == 1 && fieldpath[0] == "digest":
		return string(i.Digest), true
	case len(fieldpath) == 1 && fieldpath[0] == "size":
		return strconv.FormatInt(i.Size, 10), true
	case len(fieldpath) > 1 && fieldpath[0] == "labels":
		value, present = i.Labels[strings.Join(fieldpath[1:], ".")]
	}
	return value, present
}

// Status describes a write under way, or one that was left behind.
type Status struct {
	Ref       string // as the last writer named it
	Offset    int64  // bytes stored
	Total     int64  // bytes expected; 0 when not known
	Expected  digest.Digest
	StartedAt time.Time
	UpdatedAt time.Time
	Active    bool // a writer has it open
}

// mismatch is the class of every failed verification.
func mismatch(err error) error {
	return errclass.As(err, errdefs.ErrDataLoss, errdefs.ErrFailedPrecondition)
}
