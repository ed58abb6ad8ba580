package image

import (
	"context"
	"fmt"
	"time"

	"distkit/disk/layout"
)

// ReplaceAll gives each image its name, new or not, all in one change: after an error none of
// them has it. A name that is there keeps its labels and its time of creation; of the images
// given, only name, target and labels count.
func (n *Names) ReplaceAll(ctx context.Context, images []Image) error {
	for _, img := range images {
		if err := checkName(img.Name); err != nil {
			return err
		}
	}
	if len(images) == 0 {
		return nil
	}
	return n.change(ctx, func(ix *index) error {
		now := time.Now().UTC()
		at := positions(ix.Index)
		for _, img := range images {
			put := Image{Name: img.Name, Labels: img.Labels, CreatedAt: now}
			i, there := at[img.Name]
			if there {
				old, err := decode(ix.Entries[i])
				if err != nil {
					return err
				}
				put.Labels, put.CreatedAt = old.Labels, old.CreatedAt
			} else {
				i = len(ix.Entries)
				at[img.Name] = i
				ix.Entries = append(ix.Entries, layout.Entry{})
			}
			var err error
			if put.Target, err = n.settle(ctx, img.Target); err != nil {
				return fmt.Errorf("name %s: %w", img.Name, err)
			}
			put.UpdatedAt = now
			ix.changed(put, !there)
			if ix.Entries[i], err = put.entry(); err != nil {
				return fmt.Errorf("name %s: %w", img.Name, err)
			}
		}
		return nil
	})
}
