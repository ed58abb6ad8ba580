package image

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Validate returns InvalidArgument unless b is a manifest, index or image config (image-spec v1.1, manifest.md,
// image-index.md, config.md; or Docker's) that other tools can read.
func Validate(b []byte) error {
	if len(b) > MaxDocument {
		return fmt.Errorf("%d bytes are too much for a manifest, index or config: %w", len(b), errdefs.ErrInvalidArgument)
	}
	var kind struct {
		SchemaVersion *int            `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		RootFS        json.RawMessage `json:"rootfs"`
	}
	if err := json.Unmarshal(b, &kind); err != nil {
		return fmt.Errorf("not a manifest, index or config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if kind.RootFS != nil && kind.SchemaVersion == nil && kind.MediaType == "" {
		if err := validateConfig(b); err != nil {
			return fmt.Errorf("config: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return nil
	}
	doc, err := parseDocument("this", b)
	if err != nil {
		return err
	}
	if kind.SchemaVersion == nil || *kind.SchemaVersion != 2 {
		return fmt.Errorf("schemaVersion is not 2: %w", errdefs.ErrInvalidArgument)
	}
	var typed any = &v1.Index{}
	if doc.Config != nil {
		typed = &v1.Manifest{}
	}
	if err := json.Unmarshal(b, typed); err != nil {
		return fmt.Errorf("%s: %w: %w", doc.MediaType, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func validateConfig(b []byte) error {
	var config v1.Image
	if err := Decode(b, &config); err != nil {
		return err
	}
	switch {
	case config.OS == "" || config.Architecture == "":
		return errors.New("os or architecture is missing")
	case config.RootFS.Type != "layers":
		return fmt.Errorf("rootfs.type is %.80q, not \"layers\"", config.RootFS.Type)
	}
	for _, id := range config.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return fmt.Errorf("diff ID %.80q: %w", id, err)
		}
	}
	return nil
}
