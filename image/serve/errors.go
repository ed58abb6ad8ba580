package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Error codes (distribution-spec, "Error Codes"), and those of its reference implementation for errors without one
// there.
const (
	codeBlobUnknown         = "BLOB_UNKNOWN"
	codeUploadInvalid       = "BLOB_UPLOAD_INVALID"
	codeUploadUnknown       = "BLOB_UPLOAD_UNKNOWN"
	codeDigestInvalid       = "DIGEST_INVALID"
	codeManifestBlobUnknown = "MANIFEST_BLOB_UNKNOWN"
	codeManifestInvalid     = "MANIFEST_INVALID"
	codeManifestUnknown     = "MANIFEST_UNKNOWN"
	codeNameInvalid         = "NAME_INVALID"
	codeNameUnknown         = "NAME_UNKNOWN"
	codeSizeInvalid         = "SIZE_INVALID"
	codeUnauthorized        = "UNAUTHORIZED"
	codeDenied              = "DENIED"
	codeUnsupported         = "UNSUPPORTED"
	codeTooManyRequests     = "TOOMANYREQUESTS"
	codePageInvalid         = "PAGINATION_NUMBER_INVALID"
	codeUnknown             = "UNKNOWN"
)

// refusal is an error reply.
type refusal struct {
	status  int
	code    string
	message string
	detail  any
	headers http.Header
}

func (e *refusal) Error() string { return e.message }

func refuse(status int, code, format string, a ...any) *refusal {
	return &refusal{status: status, code: code, message: fmt.Sprintf(format, a...)}
}

// refusalOf returns the reply to an error of the store. It says nothing about files, which don't concern clients.
func refusalOf(err error) *refusal {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return refuse(http.StatusInsufficientStorage, codeDenied, "the store is full")
	case errdefs.IsNotFound(err):
		return refuse(http.StatusNotFound, codeBlobUnknown, "not found")
	case errdefs.IsInvalidArgument(err), errdefs.IsNotImplemented(err):
		return refuse(http.StatusBadRequest, codeUnsupported, "the store can't hold a name, digest or document in the request")
	case errdefs.IsUnavailable(err), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		e := refuse(http.StatusServiceUnavailable, codeTooManyRequests, "another request is working on this: try again")
		e.headers = http.Header{"Retry-After": {"1"}}
		return e
	}
	return refuse(http.StatusInternalServerError, codeUnknown, "the store failed")
}

// printable makes a client's text safe to print: one line of bounded length.
func printable(s string) string {
	if len(s) > 80 {
		s = s[:80] + "…"
	}
	return strconv.QuoteToGraphic(errclass.OneLine(s))
}

// json writes a reply with a JSON object.
func (p *reply) json(status int, mediaType string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	h := p.Header()
	h.Set("Content-Type", mediaType)
	h.Set("Content-Length", strconv.Itoa(len(b)))
	h.Set("X-Content-Type-Options", "nosniff")
	p.WriteHeader(status)
	if p.r.Method != http.MethodHead {
		_, _ = p.Write(b) // an error concerns only a client that has gone
	}
	return nil
}
