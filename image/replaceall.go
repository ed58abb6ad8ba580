package image

import (
	"fmt"
	"time"
)

// ReplaceAll gives each image its name, new or not, all in one change: after an error none of
// them has it. A name that is there keeps its labels and its time of creation; of the images
// given, only name, target and labels count.
func (n *Names) ReplaceAll(images []Image) error {
	for _, img := range images {
		if err := checkName(img.Name); err != nil {
			return err
		}
		if err := checkTarget(img.Target); err != nil {
			return err
		}
	}
	if len(images) == 0 {
		return nil
	}
	return n.change(func(ix *index) error {
		now := time.Now().UTC()
		at := make(map[string]int, len(ix.entries))
		for i, e := range ix.entries {
			if _, twice := at[e.name]; !twice {
				at[e.name] = i
			}
		}
		for _, img := range images {
			put := Image{Name: img.Name, Labels: img.Labels, CreatedAt: now}
			i, there := at[img.Name]
			if there {
				old, err := ix.entries[i].image()
				if err != nil {
					return err
				}
				put.Labels, put.CreatedAt = old.Labels, old.CreatedAt
			} else {
				i = len(ix.entries)
				at[img.Name] = i
				ix.entries = append(ix.entries, entry{})
			}
			put.Target, put.UpdatedAt = img.Target, now
			ix.changed(put, !there)
			var err error
			if ix.entries[i], err = put.entry(); err != nil {
				return fmt.Errorf("name %s: %w", img.Name, err)
			}
		}
		return nil
	})
}
