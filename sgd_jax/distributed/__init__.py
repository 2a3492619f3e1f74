"""Several devices and several processes: meshes and placement, joining and agreeing."""
