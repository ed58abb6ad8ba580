package runtime

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// maxDocument bounds an image configuration and a bundle's config.json, in bytes.
const maxDocument = 8 << 20

// maxText bounds each string that ends up in a process's arguments or environment: execve(2)
// takes no longer one.
const maxText = 128<<10 - 1

// Image is what a runtime specification needs of an image configuration, OCI's
// (image-spec config.md) or docker's: the names are the same.
type Image struct {
	Created      string   `json:"created"`
	Author       string   `json:"author"`
	Architecture string   `json:"architecture"`
	OS           string   `json:"os"`
	OSVersion    string   `json:"os.version"`
	OSFeatures   []string `json:"os.features"`
	Variant      string   `json:"variant"`
	Config       struct {
		User         string
		ExposedPorts map[string]struct{}
		Env          []string
		Entrypoint   []string
		Cmd          []string
		WorkingDir   string
		Labels       map[string]string
		StopSignal   string
	} `json:"config"`
}

// ReadImage reads one image configuration of at most 8 MiB. What is none, a manifest for
// example, is InvalidArgument.
func ReadImage(r io.Reader) (*Image, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read image config: %w", err)
	}
	if len(b) > maxDocument {
		return nil, invalid("image config is larger than %d bytes", maxDocument)
	}
	if len(strings.TrimSpace(string(b))) == 0 {
		return nil, invalid("no image config on standard input")
	}
	var probe struct {
		SchemaVersion json.RawMessage `json:"schemaVersion"`
		Config        json.RawMessage `json:"config"`
		RootFS        json.RawMessage `json:"rootfs"`
		Image
	}
	if err := json.Unmarshal(b, &probe); err != nil {
		return nil, invalid("image config: %v", err)
	}
	if probe.SchemaVersion != nil {
		return nil, invalid("this is a manifest or an index, not an image config")
	}
	if probe.Config == nil && probe.RootFS == nil {
		return nil, invalid("this is not an image config: it has neither config nor rootfs")
	}
	img := probe.Image
	if probe.Config != nil {
		if err := json.Unmarshal(probe.Config, &img.Config); err != nil {
			return nil, invalid("image config: %v", err)
		}
	}
	return &img, nil
}

// annotations are those the image's conversion implies (image-spec conversion.md); labels win.
func (img *Image) annotations() (map[string]string, error) {
	ports := make([]string, 0, len(img.Config.ExposedPorts))
	for p := range img.Config.ExposedPorts {
		ports = append(ports, p)
	}
	slices.Sort(ports)
	const prefix = "org.opencontainers.image."
	a := map[string]string{}
	for name, value := range map[string]string{
		"os":           img.OS,
		"architecture": img.Architecture,
		"variant":      img.Variant,
		"os.version":   img.OSVersion,
		"os.features":  strings.Join(img.OSFeatures, ","),
		"author":       img.Author,
		"created":      img.Created,
		"stopSignal":   img.Config.StopSignal,
		"exposedPorts": strings.Join(ports, ","),
	} {
		if value != "" {
			a[prefix+name] = value
		}
	}
	for name, value := range img.Config.Labels {
		a[name] = value
	}
	for name, value := range a {
		if err := checkText("annotation", name); err != nil {
			return nil, err
		}
		if err := checkText("annotation "+name, value); err != nil {
			return nil, err
		}
		if name == "" { // runtime-spec: keys MUST NOT be empty
			delete(a, name)
		}
	}
	return a, nil
}

// checkText refuses what no process can be given, and what JSON could not carry unchanged.
func checkText(what, s string) error {
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
