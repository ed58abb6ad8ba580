package spec

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// MaxDocument is the largest image configuration or config.json in bytes.
const MaxDocument = 8 << 20

// maxText is the longest argument or environment variable that execve(2) accepts.
const maxText = 128<<10 - 1

// Image holds the fields of an image configuration that matter for a runtime specification. The configuration is OCI's
// (image-spec config.md) or docker's, which uses the same names. Other fields are not read, least of all labels: they
// come from the image's author, and as annotations they would switch features of runtimes.
type Image struct {
	Config ImageConfig `json:"config"`
}

// ImageConfig is the part of an image configuration that describes how to run the image.
type ImageConfig struct {
	User       text
	Env        []text
	Entrypoint words
	Cmd        words
	WorkingDir text
	StopSignal stopSignal
	// Healthcheck is nil if the image has none that can be used.
	Healthcheck *Healthcheck `json:"-"`
}

// Healthcheck says how an image's author checks whether its process is well. Nothing here runs it: it is shown to whoever
// supervises the container.
type Healthcheck struct {
	Test          []string      `json:"test"`                    // CMD and the words of a command, or CMD-SHELL and a line for the shell
	Interval      time.Duration `json:"interval,omitempty"`      // all of these in nanoseconds, 0 if not given
	Timeout       time.Duration `json:"timeout,omitempty"`       //
	StartPeriod   time.Duration `json:"startPeriod,omitempty"`   //
	StartInterval time.Duration `json:"startInterval,omitempty"` //
	Retries       int           `json:"retries,omitempty"`
}

// maxHealthcheck bounds a health check, which becomes part of a container's record.
const maxHealthcheck = 16 << 10

// readHealthcheck returns nil for a health check that is none, is too long or has another form: an image runs without it.
func readHealthcheck(b json.RawMessage) *Healthcheck {
	h := &Healthcheck{}
	if len(b) > maxHealthcheck || !utf8.Valid(b) || json.Unmarshal(b, h) != nil {
		return nil
	}
	if len(h.Test) < 2 || h.Test[0] != "CMD" && h.Test[0] != "CMD-SHELL" {
		return nil
	}
	return h
}

// text is a JSON string. Bytes that are not UTF-8 are an error; encoding/json would replace them.
type text string

func (t *text) UnmarshalJSON(b []byte) error {
	if !utf8.Valid(b) {
		return fmt.Errorf("%.60q is not UTF-8", b)
	}
	return json.Unmarshal(b, (*string)(t))
}

// words is a command line: a list, or a string that is the only word (docker's StrSlice).
type words []text

func (w *words) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		*w = words{""}
		return json.Unmarshal(b, &(*w)[0])
	}
	return json.Unmarshal(b, (*[]text)(w))
}

func (w words) strings() []string {
	var s []string
	for _, t := range w {
		s = append(s, string(t))
	}
	return s
}

// stopSignal is the name or number of a signal. Any other text becomes "".
type stopSignal string

func (s *stopSignal) UnmarshalJSON(b []byte) error {
	name := strings.Trim(string(b), `"`)
	if _, err := ParseSignal(name); err == nil {
		*s = stopSignal(name)
	}
	return nil
}

// ReadImage reads an image configuration of at most 8 MiB. Any other document, such as a manifest, is InvalidArgument.
func ReadImage(r io.Reader) (*Image, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read image config: %w", err)
	}
	if len(b) > MaxDocument {
		return nil, invalid("image config is larger than %d bytes", MaxDocument)
	}
	if len(strings.TrimSpace(string(b))) == 0 {
		return nil, invalid("no image config on standard input")
	}
	var doc struct {
		SchemaVersion json.RawMessage `json:"schemaVersion"`
		Config        json.RawMessage `json:"config"`
		RootFS        json.RawMessage `json:"rootfs"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, invalid("image config: %v", err)
	}
	if doc.SchemaVersion != nil {
		return nil, invalid("this is a manifest or an index, not an image config")
	}
	if doc.Config == nil && doc.RootFS == nil {
		return nil, invalid("this is not an image config: it has neither config nor rootfs")
	}
	img := &Image{}
	if doc.Config != nil {
		if err := json.Unmarshal(doc.Config, &img.Config); err != nil {
			return nil, invalid("image config: %v", err)
		}
		var more struct{ Healthcheck json.RawMessage }
		if json.Unmarshal(doc.Config, &more) == nil {
			img.Config.Healthcheck = readHealthcheck(more.Healthcheck)
		}
	}
	return img, nil
}

// CheckText returns InvalidArgument for text that can't be passed to a process, or that JSON would change.
func CheckText(what, s string) error {
	switch {
	case strings.ContainsRune(s, 0):
		return invalid("%s %.60q contains a NUL", what, s)
	case len(s) > maxText:
		return invalid("%s %.60q is longer than %d bytes", what, s, maxText)
	case !utf8.ValidString(s):
		return invalid("%s %.60q is not UTF-8", what, s)
	}
	return nil
}
