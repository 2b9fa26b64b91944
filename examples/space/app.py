from ddpm_hf.hub.space_app import serve

serve(__file__, models="runs/digits", max_images=16, max_steps=1000, max_waiting=20)
